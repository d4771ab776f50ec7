"""Programs of others take the exported files as they are: quantizers, CoreML, ExecuTorch, AOTInductor."""

import pytest
import torch
from torch import nn

from shunted_lit.cli import main
from shunted_lit.export.wrappers import fold_residuals
from shunted_lit.models.pyramid import ShuntedPyramid
from shunted_lit.models.shunted import ShuntedBackbone, ShuntedTransformer

CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default)
NETWORKS = {
    "neck": lambda: ShuntedTransformer(16, depth=2),
    "light neck": lambda: ShuntedTransformer(16, depth=1, form="light", identity_start=True),
    "backbone": lambda: ShuntedBackbone(depths=(1, 1, 1, 1), num_classes=3),
    "plain feed-forward": lambda: ShuntedTransformer(16, depth=1, feed_forward="conventional"),
}


def randomize(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_folded_network_equals_the_original_and_leaves_it_unchanged(name):
    network = randomize(NETWORKS[name]())
    x = torch.randn(2, 3 if name == "backbone" else 16, 64, 96)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(fold_residuals(network)(x), network(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_folded_pyramid_equals_the_original():
    network = randomize(ShuntedPyramid([8, 16], dim=16))
    maps = [torch.randn(1, 8, 6, 10), torch.randn(1, 16, 3, 5)]
    with torch.no_grad():
        torch.testing.assert_close(fold_residuals(network)(maps), network(maps), rtol=1e-4, atol=1e-4)


def test_graph_has_constant_kernels_and_no_memory_format():
    """A computed kernel stops quantizers and converters; ExecuTorch's portable kernels misread channels_last."""
    main(["export", "neck", "--format=torch_export", "--options={cin: 32, depth: 2}"])
    program = torch.export.load("neck.pt2")
    parameters = {*program.graph_signature.inputs_to_parameters, *program.graph_signature.inputs_to_buffers}
    convolutions = [node for node in program.graph.nodes if node.target in CONVOLUTIONS]
    assert len(convolutions) >= 5
    assert all(node.args[1].name in parameters for node in convolutions)
    assert not [node for node in program.graph.nodes if "memory_format" in node.kwargs]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A trained neck's weights, exported as neck.pt2 and neck.onnx at one size, with an input and its output."""
    folder = tmp_path_factory.mktemp("exported")
    neck = randomize(ShuntedTransformer(128, depth=1, mlp_ratios=8))  # too wide for the exporter to fold constants
    torch.save(neck.state_dict(), folder / "neck.pth")
    size = ["--batch=1", "--height=13", "--width=18"]
    for format, suffix in (("torch_export", "pt2"), ("onnx", "onnx")):
        main(["export", str(folder / "neck.pth"), f"--format={format}", f"--out={folder}/neck.{suffix}", *size])
    x = torch.randn(1, 128, 13, 18)
    with torch.no_grad():
        return folder, x, neck(x)


def assert_close(output, expected, rel):
    assert (output - expected).abs().max() < rel * expected.abs().max()


@pytest.mark.slow
def test_onnxruntime_quantizes_the_file(exported):
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import quantize_dynamic

    folder, x, expected = exported
    quantize_dynamic(folder / "neck.onnx", folder / "dynamic.onnx")
    session = InferenceSession(folder / "dynamic.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(output), expected, 0.1)
    assert (folder / "dynamic.onnx").stat().st_size < (folder / "neck.onnx").stat().st_size / 2


@pytest.mark.slow
def test_aot_inductor_compiles_the_program(exported):
    folder, x, expected = exported
    program = torch.export.load(folder / "neck.pt2")
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "neck_aoti.pt2"))
    assert_close(torch._inductor.aoti_load_package(package)(x), expected, 1e-4)


@pytest.mark.slow
def test_coreml_converts_the_program(exported):
    """Only macOS runs CoreML; elsewhere the conversion alone is tested."""
    coremltools = pytest.importorskip("coremltools")
    folder, _, expected = exported
    program = torch.export.load(folder / "neck.pt2").run_decompositions({})
    model = coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS16)
    model.save(str(folder / "neck.mlpackage"))
    (output,) = model.get_spec().description.output
    assert list(output.type.multiArrayType.shape) == list(expected.shape)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xnnpack", "portable"])
def test_executorch_runs_the_program(exported, backend):
    pytest.importorskip("executorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    folder, x, expected = exported
    program = torch.export.load(folder / "neck.pt2")
    partitioner = [XnnpackPartitioner()] if backend == "xnnpack" else []
    (folder / "neck.pte").write_bytes(
        to_edge_transform_and_lower(program, partitioner=partitioner).to_executorch().buffer
    )
    (output,) = Runtime.get().load_program(folder / "neck.pte").load_method("forward").execute([x])
    assert_close(output, expected, 1e-4)
