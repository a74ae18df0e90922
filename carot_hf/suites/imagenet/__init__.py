"""ImageNet and its shifted relatives."""
