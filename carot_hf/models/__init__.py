"""The families of models, what makes one ready for training, and what is made of trained ones."""
