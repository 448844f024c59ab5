"""The data path: beton → uint8 canvases → pairs of views with recorded geometry."""
