"""How the small models of this repository are made: data, tokenizer, training, evaluation."""
