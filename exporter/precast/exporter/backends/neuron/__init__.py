"""The `neuron` backend: graphs for AWS Inferentia and Trainium, compiled by neuronx-cc, on any machine."""
