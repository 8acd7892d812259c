"""Images with objects in them: data sets, what a model answers, and the metric of its task."""
