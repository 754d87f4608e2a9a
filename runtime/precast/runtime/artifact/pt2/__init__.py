"""The files of torch.export, read without torch."""
