"""examples/activations.py: the batches that a training run gets, and what it is told about bad data."""

import json
import resource
import struct
import threading

import numpy as np
import pytest
import torch
from activations import ModelActivations, Pools, Shards, Synthetic
from safetensors.torch import save_file
from torch.nn.functional import embedding_bag

D, ROWS = 8, 256 * 12
# Two blocks held out; pools of three blocks, so that batches and pools cross each other's ends, and epochs' too.
OPTIONS = {"held_out_rows": 512, "pool_rows": 700}


def numbered(rows, dtype=torch.float32):
    """Rows that tell their own number, also in 16 bits."""
    n = torch.arange(rows)
    return torch.stack([n // 256, n % 256] + [n % 7] * (D - 2), dim=1).to(dtype)


def numbers(rows):
    return (rows[:, 0].long() * 256 + rows[:, 1].long()).tolist()


@pytest.fixture
def shards(tmp_path):
    """A folder of three shards whose ends are not those of blocks."""
    for name, rows in zip("abc", numbered(ROWS + 100).split([1000, 130, ROWS - 1030]), strict=True):
        np.save(tmp_path / f"{name}.npy", rows.numpy())
    return tmp_path


@pytest.fixture
def opened():
    """Makes sources that are closed after the test."""
    sources = []

    def make(source, *arguments, **options):
        sources.append(source(*arguments, **options))
        return sources[-1]

    yield make
    for source in sources:
        source.close()


def decode(indices, weight, vals):
    return embedding_bag(indices, weight, per_sample_weights=vals, mode="sum")


# Every source, and how to make it for a rank of a world.


@pytest.fixture(params=["synthetic", "shards", "model"])
def source(request, opened):
    if request.param == "synthetic":
        return lambda batch_size, **options: opened(
            Synthetic, D, 50, 0, "cpu", decode, batch_size=batch_size, **options
        )
    if request.param == "shards":
        path = request.getfixturevalue("shards")
        return lambda batch_size, **options: opened(Shards, path, batch_size, **OPTIONS, **options)
    model, text = request.getfixturevalue("gpt2"), request.getfixturevalue("text")
    options = {"context": 8, "held_out_rows": 16, "pool_rows": 100}
    return lambda batch_size, **more: opened(ModelActivations, model, text, 0, batch_size, **options, **more)


def test_a_batch_is_that_of_its_step_whatever_was_asked_before(source):
    one, other = source(60), source(60)
    batches = [one.batch(step) for step in range(30)]
    held_out = one.held_out(16)
    assert len({batch.sum().item() for batch in batches}) > 25
    for step in (29, 0, 13, 14, 3):
        assert torch.equal(other.batch(step), batches[step])
    assert torch.equal(other.held_out(16), held_out)


@pytest.mark.parametrize("world", [2, 3])
def test_the_rows_of_all_ranks_are_the_batch_of_one(source, world):
    one, ranks = source(60), [source(60, rank=rank, world=world) for rank in range(world)]
    for step in range(12):
        assert torch.equal(torch.cat([rank.batch(step) for rank in ranks]), one.batch(step))


@pytest.mark.parametrize("options", [{"rank": 2, "world": 2}, {"world": 7}, {"rank": -1, "world": 2}])
def test_ranks_without_an_equal_share_are_refused(source, options):
    with pytest.raises(ValueError, match="has no equal share of a batch of 60"):
        source(60, **options)


# Synthetic


def test_synthetic_samples_are_sparse_sums_of_unit_rows_that_zipf_draws():
    codes = []

    def dense(indices, weight, vals):
        codes.append(torch.zeros(len(vals), len(weight)).scatter_add(1, indices, vals))
        return codes[-1] @ weight

    features, B = 1000, 20_000
    data = Synthetic(D, features, 3, "cpu", dense, batch_size=B)
    batch = data.batch(5)
    (codes,) = codes
    assert torch.equal(batch, codes @ data.dictionary)
    torch.testing.assert_close(data.dictionary.norm(dim=1), torch.ones(features))
    assert (codes >= 0).all()
    assert ((codes > 0).sum(1) <= 24).all()
    # Magnitudes have mean 1, so that sums of codes count draws: binomial, and within six standard deviations.
    p = 1 / torch.arange(1, features + 1)
    expected = 24 * B * p / p.sum()
    for first, last in ((0, 1), (1, 2), (9, 10), (100, 200), (500, 1000)):
        share = expected[first:last].sum()
        assert abs(codes[:, first:last].sum() - share) < 6 * (2 * share) ** 0.5


def test_seeds_and_held_out_samples_differ():
    one, other = (Synthetic(D, 50, seed, "cpu", decode, batch_size=16) for seed in (0, 1))
    assert not torch.equal(one.dictionary, other.dictionary)
    samples = [one.batch(0), one.batch(1), one.held_out(16), other.batch(0)]
    assert len({sample.sum().item() for sample in samples}) == 4


# Shards


@pytest.mark.parametrize("batch_size", [60, 256, 768, 1000])
def test_every_row_comes_once_an_epoch_and_held_out_rows_never(shards, opened, batch_size):
    data = opened(Shards, shards, batch_size, **OPTIONS)
    held_out = numbers(data.held_out(512))
    training = sorted(set(range(ROWS)) - set(held_out))
    assert len(training) == ROWS - 512  # whole blocks of it; the last 100 rows are not one
    # Six epochs of ten blocks are a whole number of pools, of three blocks or, for the largest batch, four.
    steps = -(-6 * len(training) // batch_size)
    rows = numbers(torch.cat([data.batch(step) for step in range(steps)]))[: 6 * len(training)]
    assert sorted(rows) == sorted(6 * training)
    assert len(set(rows[:2048])) == 2048  # pools of the first epoch alone
    assert rows[:768] != sorted(rows[:768])


def test_every_epoch_and_every_pool_has_an_order_of_its_own_and_so_has_a_seed(shards, opened):
    options = {"held_out_rows": 512, "pool_rows": 256}
    data, other = (opened(Shards, shards, 256, seed=seed, **options) for seed in (0, 1))
    pools = [numbers(data.batch(step)) for step in range(20)]  # of a block each, two epochs
    blocks = [pool[0] // 256 for pool in pools]
    assert blocks[:10] != blocks[10:]
    assert sorted(blocks[:10]) == sorted(blocks[10:])
    assert len({tuple(n % 256 for n in pool) for pool in pools}) == 20
    assert [numbers(other.batch(step))[0] // 256 for step in range(10)] != blocks[:10]
    assert torch.equal(other.held_out(512), data.held_out(512))  # so that runs are comparable


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_formats_and_dtypes_read_the_same(tmp_path, opened, dtype):
    rows = numbered(ROWS, dtype)
    save_file({"activations": rows, "labels": torch.zeros(3)}, tmp_path / "named.safetensors")
    save_file({"x": rows}, tmp_path / "only.safetensors", metadata={"model": "gpt2"})
    paths = [tmp_path / "named.safetensors", tmp_path / "only.safetensors"]
    if dtype != torch.bfloat16:
        np.save(tmp_path / "rows.npy", rows.numpy())
        paths.append(tmp_path / "rows.npy")
    one, *others = [opened(Shards, path, 64, **OPTIONS) for path in paths]
    batch = one.batch(3)
    assert batch.dtype == one.dtype == dtype
    assert torch.equal(batch, rows[numbers(batch)])
    for other in others:
        assert torch.equal(other.batch(3), batch)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_file_larger_than_memory_is_never_read_whole(tmp_path, opened, suffix):
    width, rows = 4096, 2**26  # a TiB, of a sparse file
    path = tmp_path / f"large{suffix}"
    with path.open("wb") as file:
        if suffix == ".npy":
            header = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
            np.lib.format.write_array_header_1_0(file, header)
        else:
            tensor = {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, rows * width * 4]}
            header = json.dumps({"activations": tensor}).encode()
            file.write(struct.pack("<Q", len(header)) + header)
        try:
            file.truncate(file.tell() + rows * width * 4)
        except OSError:
            pytest.skip("the file system has no file of a TiB")
    data = opened(Shards, path, 64, pool_rows=1024, held_out_rows=256)
    assert data.batch(10**9).shape == (64, width)


def save_npy(path, array):
    np.save(path, array)
    return path


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])
    return path


def extended(path):
    path.write_bytes(path.read_bytes() + b"0")
    return path


def written(path, data):
    path.write_bytes(data)
    return path


def saved(path, **tensors):
    save_file(tensors, path)
    return path


def folder(path, *arrays):
    path.mkdir()
    for number, array in enumerate(arrays):
        np.save(path / f"{number}.npy", array)
    return path


X = np.zeros((1024, D), np.float32)
BAD = {
    "missing": (lambda path: path / "x.npy", r"x\.npy: cannot be read: .*No such file"),
    "other_file": (lambda path: written(path / "x.pt", b""), r"x\.pt: cannot be read: neither a folder nor \.npy nor"),
    "empty_folder": (lambda path: folder(path / "f"), r"f: has no \.npy or \.safetensors file"),
    "dimensions": (lambda path: save_npy(path / "x.npy", X[0]), r"x\.npy: must be \[rows, D\], is \[8\]"),
    "tensor_dimensions": (
        lambda path: saved(path / "x.safetensors", x=torch.zeros(2, 3, 4)),
        r"x\.safetensors: must be \[rows, D\], is \[2, 3, 4\]",
    ),
    "dtype": (lambda path: save_npy(path / "x.npy", X.astype(float)), r"x\.npy: must be float16, .*, is <f8"),
    "byte_order": (lambda path: save_npy(path / "x.npy", X.astype(">f4")), r"x\.npy: must be float16, .*, is >f4"),
    "no_rows": (
        lambda path: saved(path / "x.safetensors", x=torch.zeros(0, 4)),
        r"x\.safetensors: must be \[rows, D\], is \[0, 4\]",
    ),
    "tensor_dtype": (
        lambda path: saved(path / "x.safetensors", x=torch.zeros(4, 4, dtype=torch.int32)),
        r"x\.safetensors: must be float16, .*, is I32",
    ),
    "objects": (lambda path: save_npy(path / "x.npy", np.array([None])), r"x\.npy: cannot be read: .*objects"),
    "fortran": (lambda path: save_npy(path / "x.npy", np.asfortranarray(X)), r"x\.npy: .* Fortran order"),
    "width": (lambda path: folder(path / "f", X, X[:, 1:]), r"1\.npy: has torch.float32 of width 7, but .*0\.npy has"),
    "mixed": (lambda path: folder(path / "f", X, X.astype(np.float16)), r"1\.npy: has torch.float16 .*, but .*0\.npy"),
    "truncated": (lambda path: truncated(save_npy(path / "x.npy", X)), r"x\.npy: cannot be read: .*size"),
    "extended": (lambda path: extended(save_npy(path / "x.npy", X)), r"x\.npy: cannot be read: .*size"),
    "not_npy": (lambda path: written(path / "x.npy", b"hello, world"), r"x\.npy: cannot be read: .*magic"),
    "empty": (lambda path: written(path / "x.npy", b""), r"x\.npy: cannot be read: "),
    "truncated_tensor": (
        lambda path: truncated(saved(path / "x.safetensors", x=torch.zeros(9, 9))),
        r"x\.safetensors: cannot be read: .*not fully covered",
    ),
    "not_safetensors": (
        lambda path: written(path / "x.safetensors", b"hello, world"),
        r"x\.safetensors: cannot be read: .*header",
    ),
    "two_tensors": (
        lambda path: saved(path / "x.safetensors", x=torch.zeros(9, 9), y=torch.zeros(9, 9)),
        r'x\.safetensors: .*2 tensors, none called "activations"',
    ),
    "few_rows": (
        lambda path: save_npy(path / "x.npy", X),
        r"x\.npy: 1024 rows in blocks of 256 are too few for a batch of 600 and 512 held-out rows",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_shards_are_refused_by_name(tmp_path, case):
    make, message = BAD[case]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message):
        Shards(path, 600, held_out_rows=512)


def test_no_more_held_out_rows_than_were_set_aside(shards, opened):
    data = opened(Shards, shards, 60, **OPTIONS)
    assert [len(data.held_out(n)) for n in (0, 1, 512)] == [0, 1, 512]
    with pytest.raises(ValueError, match="513 held-out rows asked for, but 512 are set aside"):
        data.held_out(513)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_reported_with_its_shard(shards, opened, value):
    array = np.load(shards / "b.npy")
    array[17, D - 1] = value
    np.save(shards / "b.npy", array)
    data = opened(Shards, shards, 256, pool_rows=256, held_out_rows=0)
    with pytest.raises(ValueError, match=r"NaN or infinity in .*b\.npy, row 17$"):
        for step in range(ROWS // 256):
            data.batch(step)


def test_a_file_that_is_truncated_while_it_is_used_is_reported(shards, opened):
    data = opened(Shards, shards, 256, pool_rows=256, held_out_rows=0)
    (shards / "b.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\.npy: has become shorter"):
        for step in range(ROWS // 256):
            data.batch(step)


def test_more_shards_than_a_process_may_open(tmp_path, opened):
    rows = numbered(2048)
    for number, part in enumerate(rows.split(2)):
        np.save(tmp_path / f"{number:04}.npy", part.numpy())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        data = opened(Shards, tmp_path, 1792, held_out_rows=256)
        batch = data.batch(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert torch.equal(batch, rows[numbers(batch)])


def test_the_largest_finite_rows_are_fine(tmp_path, opened):
    np.save(tmp_path / "x.npy", np.full((1024, D), np.finfo(np.float32).max))
    data = opened(Shards, tmp_path / "x.npy", 64, held_out_rows=256)
    assert data.batch(0).shape == (64, D)


# The reading thread


class Failing(Pools):
    """Fails to read the blocks of all pools but the first."""

    D, dtype, _name, _block_rows = 1, torch.float32, "the data", 4

    def __init__(self):
        self.threads, self.read_ahead = [], threading.Event()
        super().__init__(8, 4, pool_rows=16, held_out_rows=0)

    def _read(self, blocks):
        self.threads.append(threading.current_thread())
        if len(self.threads) > 1:
            self.read_ahead.set()
            raise OSError("the disk is gone")
        return torch.zeros(len(blocks) * 4, 1)


def test_an_error_of_the_reading_thread_is_raised_where_its_rows_are_needed(opened):
    data = opened(Failing)
    for step in range(4):
        data.batch(step)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            data.batch(4)
    assert threading.current_thread() not in data.threads


def test_the_next_pool_is_read_while_this_one_is_used(opened):
    data = opened(Failing)
    data.batch(0)
    assert data.read_ahead.wait(10)


def test_close_ends_the_thread_that_reads(shards):
    before = set(threading.enumerate())
    data = Shards(shards, 60, **OPTIONS)
    data.batch(0)
    data.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(RuntimeError, match="after shutdown"):
        data.batch(0)


# Activations of a model

WORDS = ["<eos>", "[CLS]", "[SEP]", "[UNK]", "the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "slept"]


def save_tokenizer(path, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "cls_token" in special:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(path)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(WORDS), n_positions=32, n_embd=D, n_layer=3, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    save_tokenizer(path, eos_token="<eos>")
    return str(path)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=D, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(path)
    save_tokenizer(path, cls_token="[CLS]", sep_token="[SEP]")
    return str(path)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """40 contexts of 8 tokens of GPT-2 and 3 words more."""
    generator = torch.Generator().manual_seed(0)
    words = [WORDS[i] for i in torch.randint(3, len(WORDS), (323,), generator=generator)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(words[i : i + 10]) for i in range(0, len(words), 10)))
    return path


def in_order(rows):
    """Rows sorted, so that sets of them can be compared."""
    return rows[np.lexsort(rows.numpy().T)]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_activations_are_the_hidden_states_of_all_tokens_but_special_ones(request, opened, text, kind, layer):
    from transformers import AutoModel, AutoTokenizer

    path = request.getfixturevalue(kind)
    special = 2 if kind == "bert" else 0
    words = text.read_text().split()
    ids = AutoTokenizer.from_pretrained(path).convert_tokens_to_ids(words)
    contexts = torch.tensor(ids[: len(ids) // (8 - special) * (8 - special)]).view(-1, 8 - special)
    if kind == "bert":
        contexts = torch.nn.functional.pad(torch.nn.functional.pad(contexts, (1, 0), value=1), (0, 1), value=2)
    with torch.no_grad():
        states = AutoModel.from_pretrained(path)(contexts, output_hidden_states=True).hidden_states[layer + 1]
    expected = states[:, 1:-1] if kind == "bert" else states
    rows = len(contexts) * (8 - special)
    data = opened(ModelActivations, path, text, layer, rows, context=8, held_out_rows=0)
    assert data.D == D
    torch.testing.assert_close(in_order(data.batch(0)), in_order(expected.flatten(0, 1)))


def test_the_last_layer_is_before_the_final_norm(gpt2, text, opened):
    from transformers import AutoModel

    norm = AutoModel.from_pretrained(gpt2).ln_f
    data = opened(ModelActivations, gpt2, text, 2, 320, context=8, held_out_rows=0)
    rows = data.batch(0)
    assert not torch.allclose(norm(rows), rows, atol=0.1)


def test_texts_of_jsonl_are_those_of_a_plain_file_with_their_separator(gpt2, tmp_path, opened):
    texts = ["the cat sat", "it slept on a mat and then", "it sat"] * 9
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "texts.txt").write_text("<eos>".join(texts))
    one, other = (
        opened(ModelActivations, gpt2, [tmp_path / name], 1, 16, context=8, held_out_rows=0)
        for name in ("texts.jsonl", "texts.txt")
    )
    assert torch.equal(one.batch(0), other.batch(0))


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_shards_read_back_what_a_model_saves(gpt2, text, tmp_path, opened, dtype):
    text_of_many = tmp_path / "many.txt"
    text_of_many.write_text(text.read_text() * 3)
    data = opened(ModelActivations, gpt2, text_of_many, 1, 8, context=8, held_out_rows=80)
    data.save(tmp_path / "shards", dtype=dtype, shard_rows=300)
    files = sorted((tmp_path / "shards").iterdir())
    assert [file.name for file in files] == [f"{number:05}.safetensors" for number in range(len(files))]
    assert len(files) == 4
    rows = 960 // 256 * 256
    saved_rows = opened(Shards, tmp_path / "shards", rows, held_out_rows=0).batch(0)
    whole = opened(ModelActivations, gpt2, text_of_many, 1, 960, context=8, held_out_rows=0).batch(0)
    assert saved_rows.dtype == (dtype or torch.float32)
    found = {tuple(row) for row in whole.to(saved_rows.dtype).tolist()}
    assert {tuple(row) for row in saved_rows.tolist()} <= found
    with pytest.raises(ValueError, match="has shards already"):
        data.save(tmp_path / "shards")


def test_a_full_disk_leaves_whole_shards_and_a_clear_error(gpt2, text, tmp_path, opened, monkeypatch):
    import safetensors.torch

    save_file, written = safetensors.torch.save_file, []

    def fails_at_the_third(tensors, path):
        save_file(tensors, path)
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fails_at_the_third)
    data = opened(ModelActivations, gpt2, text, 1, 8, context=8, held_out_rows=80)
    with pytest.raises(
        OSError, match=r"00002\.safetensors: cannot be written: .*No space left.*; 2 shards are finished"
    ):
        data.save(tmp_path / "shards", shard_rows=100)
    assert [file.name for file in sorted((tmp_path / "shards").iterdir())] == ["00000.safetensors", "00001.safetensors"]


def test_activations_too_large_for_float16_are_not_saved_as_infinity(gpt2, text, tmp_path, opened):
    data = opened(ModelActivations, gpt2, text, 1, 8, context=8, held_out_rows=80)
    with torch.no_grad():
        data._model.wte.weight.mul_(1e7)
    with pytest.raises(ValueError, match=r"torch\.float16 has no room"):
        data.save(tmp_path / "shards", dtype=torch.float16)
    assert not list((tmp_path / "shards").iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 3}, "has 3 layers, numbered from 0, and no layer 3"),
        ({"layer": -1}, "has 3 layers, numbered from 0, and no layer -1"),
        ({"context": 33}, "takes 32 tokens, not a context of 33"),
        ({"model": "no/such/model"}, "no/such/model: cannot be loaded"),
        ({"text": "no_such.txt"}, r"no_such\.txt: cannot be read"),
        ({"text": b"\xff\xfe the cat"}, r"text\.jsonl: cannot be read"),
        ({"text": b"the cat\n"}, r"text\.jsonl: cannot be read"),
        ({"text": b'{"words": "the cat"}\n'}, r"text\.jsonl: cannot be read"),
        ({"text": b""}, "shorter than a context of 8 tokens"),
        ({"text": b'{"text": "the cat sat"}\n'}, "shorter than a context of 8 tokens"),
        ({"batch_size": 1000}, "320 rows in blocks of 8 are too few for a batch of 1000"),
    ],
)
def test_bad_models_and_texts_are_refused_by_name(gpt2, text, tmp_path, monkeypatch, change, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if isinstance(change.get("text"), bytes):
        (tmp_path / "text.jsonl").write_bytes(change["text"])
        change = {"text": tmp_path / "text.jsonl"}
    arguments = {"model": gpt2, "text": text, "layer": 0, "batch_size": 8, "context": 8, "held_out_rows": 0, **change}
    with pytest.raises(ValueError, match=message):
        ModelActivations(**arguments)


@pytest.mark.parametrize("package", ["transformers", "safetensors"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ValueError, match=f"{package} is missing: pip install {package}"):
        if package == "transformers":
            ModelActivations("gpt2", "x.txt", 0, 8)
        else:
            Shards(written(tmp_path / "x.safetensors", b""), 8)
