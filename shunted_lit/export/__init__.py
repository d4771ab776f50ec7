"""Export of networks to ONNX, OpenVINO, torch.export and safetensors."""
