"""Networks, training and evaluation: tensors in, tensors out."""
