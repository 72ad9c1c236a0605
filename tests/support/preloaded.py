"""What the processes of ``forks`` find imported."""

import handler  # noqa: F401
from src.startup.import_libraries import import_libraries

import_libraries(eager=["peft"])
