"""Keras' saved networks (.keras files of Keras 3): the weights' file, the configuration, the layers."""
