"""Files that nobody vouches for: arrays come out as they went in, and nothing is ever executed."""

import builtins
import codecs
import collections
import os
import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch

from pem_lightning.checkpoints import load_weights
from pem_lightning.checkpoints.safe_load import as_tensor, read_content
from pem_lightning.types import UserError
from tests.checkpoint_files import Calls, write_pickle

ARRAYS = {
    "float": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.ones(3, np.float16),
    "swapped": np.arange(3, dtype=">f8"),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "count": np.array(7),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
}


def check(content):
    for name, array in ARRAYS.items():
        tensor = as_tensor(content[name])
        assert tensor.shape == array.shape, name
        assert torch.equal(tensor, torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))), name


@pytest.mark.parametrize("numpy_core", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("protocol", range(6))
def test_arrays_in_pickles_of_all_protocols_and_numpy_versions(tmp_path, protocol, numpy_core):
    path = tmp_path / "a.pkl"
    content = collections.OrderedDict(ARRAYS, lr=np.float64(0.5), n=np.int64(3), names=["a", None, {"b": (1, 2)}])
    text = pickle.dumps(content, protocol)
    if protocol < 4:  # from then on strings have their lengths before them
        text = text.replace(b"numpy._core", numpy_core.encode())
    path.write_bytes(text)
    content = read_content(path)
    check(content)
    assert (content["lr"], content["n"]) == (0.5, 3)
    assert content["names"] == ["a", None, {"b": (1, 2)}]


def test_a_pickle_of_python_2(tmp_path):
    """There, an array's memory is a string."""
    path = tmp_path / "a.pkl"
    memory = np.array([1.5, -2.0], "<f4").tobytes()
    path.write_bytes(
        b"\x80\x02}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08" + memory + b"tbs."
    )
    assert as_tensor(read_content(path)["a"]).tolist() == [1.5, -2.0]


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_with_tensors_and_arrays(tmp_path, zipped):
    path = tmp_path / "a.pth"
    tensor = torch.randn(3)
    torch.save({"t": tensor, "lr": np.float64(0.5), **ARRAYS}, path, _use_new_zipfile_serialization=zipped)
    content = read_content(path)
    check(content)
    assert torch.equal(as_tensor(content["t"]), tensor)
    assert content["lr"] == 0.5
    assert as_tensor(content["lr"]) is None


def test_safetensors(tmp_path, monkeypatch):
    save_file = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file
    save_file({"a": torch.arange(3.0)}, tmp_path / "a.bin")
    assert as_tensor(read_content(tmp_path / "a.bin")["a"]).tolist() == [0, 1, 2]
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        read_content(tmp_path / "a.bin")


EXECUTED = []


def execute(text):
    EXECUTED.append(text)


def attacks(mark):
    shell = f"touch {mark}"
    return {
        "system": Calls(os.system, shell),
        "eval": Calls(builtins.eval, f"open({str(mark)!r}, 'w')"),
        "nested": {"model": {"a": [Calls(getattr, Calls(__import__, "os"), "system")]}},
        "reduce in an array": np.array([Calls(os.system, shell)], dtype=object),
        "reduce as an argument": Calls(collections.OrderedDict, [("a", Calls(os.system, shell))]),
        "our own code": Calls(execute, "x"),
        "numpy's own evaluation": Calls(np.load, str(mark)),
        "codec": Calls(codecs.encode, "x", "rot13"),
    }


@pytest.mark.parametrize("kind", list(attacks("")))
@pytest.mark.parametrize("form", ["pickle", "torch", "old torch"])
def test_nothing_malicious_is_executed(tmp_path, kind, form):
    mark, path = tmp_path / "executed", tmp_path / "evil.pkl"
    content = {"conv1.weight": attacks(mark)[kind]}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(UserError) as caught:
        load_weights(torch.nn.Linear(1, 1), path)
    (message,) = str(caught.value).splitlines()
    assert str(path) in message
    reasons = {"codec": "encoded as 'rot13'", "reduce in an array": "which are no numbers"}
    if not (kind == "codec" and form != "pickle"):  # torch has its own reader of bytes
        assert reasons.get(kind, "which is no plain data: nothing was executed") in message
    assert not mark.exists()
    assert EXECUTED == []


def test_the_attacks_would_have_worked(tmp_path):
    for kind in ("system", "eval", "reduce in an array", "reduce as an argument"):
        mark = tmp_path / kind.replace(" ", "_")
        pickle.loads(pickle.dumps(attacks(mark)[kind]))
        assert mark.exists(), kind


def array_with(shape, dtype):
    """Pickles as an array that claims a shape and a type for eight bytes."""
    reconstruct, arguments, _ = np.zeros(0).__reduce__()

    class Array:
        def __reduce__(self):
            return reconstruct, arguments, (1, shape, dtype, False, b"\x41" * 8)

    return Array()


class LyingType:
    """A float type that claims to hold objects would make NumPy follow made-up pointers."""

    def __reduce__(self):
        return np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 63)


def test_an_array_cannot_lie_about_its_memory(tmp_path):
    path = write_pickle(tmp_path / "a.pkl", {"a": array_with((1,), LyingType())})
    assert as_tensor(read_content(path)["a"]).dtype == torch.float64
    with pytest.raises(UserError, match="is damaged or no file of weights"):
        read_content(write_pickle(tmp_path / "b.pkl", {"a": array_with((1 << 40,), np.dtype("f8"))}))


@pytest.mark.parametrize("values", [np.array(["a"]), np.zeros(2, "M8[s]"), np.zeros(2, [("a", "f4")])])
def test_arrays_of_no_numbers_are_refused(tmp_path, values):
    with pytest.raises(UserError, match="damaged or no file of weights"):
        read_content(write_pickle(tmp_path / "a.pkl", {"a": values}))


def test_damaged_files_are_one_line(tmp_path):
    path, zipped = tmp_path / "a.pth", tmp_path / "zipped"
    torch.save({"a": torch.ones(1000)}, path)
    whole, whole_pickle = path.read_bytes(), pickle.dumps({"a": np.ones(1000)})
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("a.txt", "no weights")
    contents = (b"", b"text", whole[:-500], whole[500:], zipped.read_bytes(), whole_pickle[:-50], b"\x80\x02" * 50)
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.pth is damaged or no file of weights") as caught:
            read_content(path)
        assert len(str(caught.value).splitlines()) == 1


def test_what_has_no_names_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds a list and no weights by name"):
        read_content(write_pickle(tmp_path / "a.pkl", [1, 2]))
    torch.save(torch.ones(2), tmp_path / "b.pth")
    with pytest.raises(UserError, match="holds a Tensor and no weights by name"):
        read_content(tmp_path / "b.pth")
