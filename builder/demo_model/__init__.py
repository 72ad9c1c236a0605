"""How the embedded model was made: scenes, captions, training, evaluation."""
