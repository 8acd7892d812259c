"""What a model says of images with objects in them, and the metric of its task."""
