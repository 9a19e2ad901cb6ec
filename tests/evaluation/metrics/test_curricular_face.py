import torch

from refalign_evaluation.metrics.curricular_face import CurricularFace
from tests.evaluation.tiny_metrics import FACE_NETWORK


def test_keys_and_shapes_are_those_of_ir_101():
    with torch.device("meta"):
        network = CurricularFace()
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert shapes["input_layer.0.weight"] == (64, 3, 3, 3)
    assert shapes["input_layer.2.weight"] == (64,)
    assert shapes["body.3.shortcut_layer.0.weight"] == (128, 64, 1, 1)
    assert shapes["body.3.shortcut_layer.1.running_mean"] == (128,)
    assert shapes["body.48.res_layer.4.weight"] == (512, 512, 3, 3)
    assert shapes["output_layer.0.weight"] == (512,)
    assert shapes["output_layer.3.weight"] == (512, 512 * 7 * 7)
    assert shapes["output_layer.4.running_var"] == (512,)
    assert "output_layer.4.weight" not in shapes
    assert "body.0.shortcut_layer.0.weight" not in shapes
    shortcuts = {key.split(".")[1] for key in shapes if "shortcut_layer" in key}
    assert shortcuts == {"3", "16", "46"}  # where the width changes: 3, 13, 30 and 3 blocks
    blocks = {key.split(".")[1] for key in shapes if key.startswith("body")}
    assert len(blocks) == 49
    block = {key.removeprefix("body.0.") for key in shapes if key.startswith("body.0.")}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"res_layer.{number}.{name}" for number in (0, 2, 5) for name in norm}
    assert block == expected | {"res_layer.1.weight", "res_layer.3.weight", "res_layer.4.weight"}


def test_a_small_one_makes_embeddings_of_faces():
    network = CurricularFace(**FACE_NETWORK).eval()
    assert network(torch.zeros(2, 3, 112, 112)).shape == (2, 512)


def test_a_block_adds_what_its_stride_leaves():
    network = CurricularFace(**FACE_NETWORK).eval()
    block = network.body[0]
    torch.nn.init.zeros_(block.res_layer[4].weight)  # nothing but the shortcut is left
    features = torch.randn(1, 4, 8, 8)
    assert torch.equal(block(features), features[:, :, ::2, ::2])
