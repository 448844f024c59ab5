"""The data path: beton → uint8 canvases → paired views with recorded geometry."""
