"""Runtimes of exported files, used directly, and checkpoints to export."""

import torch

from shunted_lit.export.formats import openvino_core

SMALL = {
    "backbone": "resnet18", "neck": {"depth": 1, "mlp_ratios": 1}, "levels": [3, 4, 5], "pyramid_channels": 32,
    "min_size": 64, "max_size": 128, "anchor_scale": 0.25,
}  # fmt: skip


def run_onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {session.get_inputs()[0].name: x.numpy()})


def run_openvino(path):
    model = openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: [out.copy() for out in model(x.numpy()).values()]


def run_torch_export(path):
    module = torch.export.load(path).module()

    def run(x):
        outputs = module(x)
        return [out.detach().numpy() for out in ((outputs,) if torch.is_tensor(outputs) else outputs)]

    return run


RUNTIMES = {"onnx": (run_onnx, ".onnx"), "openvino": (run_openvino, ".xml"), "torch_export": (run_torch_export, ".pt2")}


def save_checkpoint(task, path):
    """Save what `shunted-lit fit` saves of a task, without a run; return the path as text."""
    content = {
        "state_dict": task.state_dict(),
        "hyper_parameters": dict(task.hparams),
        "pytorch-lightning_version": "2.6",
    }
    task.on_save_checkpoint(content)
    torch.save(content, path)
    return str(path)
