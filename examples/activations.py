"""Activations to train sparse autoencoders on: synthetic ones, shards on disk, or those of a Hugging Face model.

Every source gives `batch(step)`, rows of width `D` on the device, and `held_out(n)`, rows that no batch contains. A
batch is a function of the seed and the step alone: a checkpoint needs no position in the data but the step. Rank r of N
gets rows ``[r * B / N, (r + 1) * B / N)`` of the batch of B that a single process gets.
"""

import bisect
import itertools
import json
import math
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

# What random numbers are for: each purpose has streams of its own.
DICTIONARY, BATCH, HELD_OUT, BLOCKS, ROWS = range(5)
# As safetensors and numpy call them
DTYPES = {"F16": torch.half, "<f2": torch.half, "BF16": torch.bfloat16, "F32": torch.float, "<f4": torch.float}


def generator(seed, purpose, number, device="cpu"):
    """A torch.Generator whose stream is that of (seed, purpose, number), unrelated to any other's."""
    (state,) = np.random.SeedSequence((seed, purpose, number)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state))


def permutation(n, seed, purpose, number, device="cpu"):
    """A random order of n things, int64."""
    return torch.randperm(n, generator=generator(seed, purpose, number, device), device=device)


def share(batch_size, rank, world):
    """The rows of a batch that are this rank's."""
    if not 0 <= rank < world or batch_size < world or batch_size % world:
        raise ValueError(f"rank {rank} of {world} has no equal share of a batch of {batch_size}")
    return slice(rank * batch_size // world, (rank + 1) * batch_size // world)


class Synthetic:
    """Sparse sums of the rows of a random dictionary, so that the features which an SAE should find are known.

    Args:
        D: the width.
        features: how many rows the dictionary has. Row i is drawn with a probability proportional to 1 / (i + 1).
        decode: `triton_sae_decode`.
        batch_size: of all ranks together.
        active: how many features are drawn for a sample, each with an exponentially distributed activation of mean 1;
            those of a feature that is drawn twice add up.

    ``dictionary [features, D]``, float32, has unit rows.
    """

    def __init__(self, D, features, seed, device, decode, *, batch_size, active=24, rank=0, world=1):
        self.D, self._seed, self._device, self._decode, self._active = D, seed, device, decode, active
        self._batch_size, self._share = batch_size, share(batch_size, rank, world)
        rows = torch.randn(features, D, generator=generator(seed, DICTIONARY, 0))
        self.dictionary = torch.nn.functional.normalize(rows, dim=1).to(device)
        # float64: float32 would round the rare features of a large dictionary away
        cumulative = (1 / torch.arange(1, features + 1, dtype=torch.float64, device=device)).cumsum(0)
        self._cumulative = cumulative / cumulative[-1]

    def batch(self, step):
        """``[B / world, D]`` float32: the batch of this step."""
        return self._draw(generator(self._seed, BATCH, step, self._device), self._batch_size, self._share)

    def held_out(self, n):
        """``[n, D]`` float32, the same on every rank and drawn from another stream than any batch."""
        return self._draw(generator(self._seed, HELD_OUT, 0, self._device), n, slice(n))

    def close(self):
        pass

    def _draw(self, random, n, rows):
        options = {"generator": random, "device": self._device}
        places = torch.rand(n, self._active, dtype=torch.float64, **options)
        indices = torch.searchsorted(self._cumulative, places, right=True)
        vals = torch.empty(n, self._active, device=self._device).exponential_(generator=random)
        return self._decode(indices[rows], self.dictionary, vals[rows])


class Pools:
    """Batches from more rows than fit the device, in an order that is close to random.

    The rows are in blocks of neighbours. The blocks of all epochs, each epoch a random permutation, are one sequence.
    Pool p is its p-th run of about `pool_rows` rows, permuted on the device, and the rows of one pool after the other
    are the batches. A thread reads the next pool while this one is used. An epoch has every row once, and shares its
    last pool with the next one.

    A subclass sets `D`, `dtype`, `_name` and `_block_rows`, and has `_read(blocks)`, the rows of these blocks, and
    `_origin(block, row)`, a row's name for error messages.

    Args:
        batch_size: of all ranks together.
        pool_rows: how many rows, about, are shuffled at a time; the device has two such pools.
        held_out_rows: how many rows, at least, are kept from training.
    """

    _part_rows = 2**14  # read at a time

    def __init__(
        self, blocks, batch_size, *, seed=0, device="cpu", pool_rows=2**17, held_out_rows=2**14, rank=0, world=1
    ):
        self._seed, self._device = seed, torch.empty(0, device=device).device  # with the index of a GPU
        self._batch_size, self._share = batch_size, share(batch_size, rank, world)
        held_out = math.ceil(held_out_rows / self._block_rows)
        if (blocks - held_out) * self._block_rows < batch_size:
            rows, needed = blocks * self._block_rows, f"a batch of {batch_size} and {held_out_rows} held-out rows"
            raise ValueError(f"{self._name}: {rows} rows in blocks of {self._block_rows} are too few for {needed}")
        # Whatever the seed, so that runs of several seeds are comparable.
        order = permutation(blocks, 0, HELD_OUT, 0)
        self._held_out_blocks, self._blocks = order[:held_out], order[held_out:]
        self._pool_blocks = min(math.ceil(max(pool_rows, batch_size) / self._block_rows), len(self._blocks))
        stream = None
        if self._device.type == "cuda":
            stream = torch.cuda.Stream(self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
        self._reader = ThreadPoolExecutor(1, initializer=torch.cuda.set_stream, initargs=(stream,))
        self._pools, self._closed = {}, False

    def batch(self, step):
        """``[B / world, D]`` in the data's dtype: the batch of this step. Raises what reading it raised."""
        first = step * self._batch_size + self._share.start
        pool, start = divmod(first, self._pool_blocks * self._block_rows)
        n = self._share.stop - self._share.start
        rows = self._take(pool, start, start + n)
        if len(rows) < n:
            rows = torch.cat([rows, self._take(pool + 1, 0, n - len(rows))])
        return rows

    def held_out(self, n):
        """``[n, D]`` in the data's dtype, the same on every rank. No batch has them."""
        available = len(self._held_out_blocks) * self._block_rows
        if n > available:
            raise ValueError(f"{n} held-out rows asked for, but {available} are set aside")
        blocks = self._held_out_blocks[: math.ceil(n / self._block_rows)].tolist()
        return self._result(self._reader.submit(self._load, blocks))[0][:n]

    def close(self):
        """End the thread."""
        self._closed = True
        self._reader.shutdown(cancel_futures=True)
        self._pools.clear()

    def _take(self, pool, start, stop):
        self._pools = {p: future for p, future in self._pools.items() if p in (pool, pool + 1)}
        for p in (pool, pool + 1):
            if p not in self._pools:
                self._pools[p] = self._reader.submit(self._pool, p)
        rows, order = self._result(self._pools[pool])
        return rows[order[start:stop]]

    def _result(self, future):
        """The tensors that a future gives, whose memory is kept until the caller's stream is done with them."""
        tensors = future.result()
        for tensor in tensors if self._device.type == "cuda" else ():
            tensor.record_stream(torch.cuda.current_stream(self._device))
        return tensors

    def _pool(self, pool):
        epoch, start = divmod(pool * self._pool_blocks, len(self._blocks))
        orders = [permutation(len(self._blocks), self._seed, BLOCKS, e) for e in (epoch, epoch + 1)]
        blocks = self._blocks[torch.cat(orders)[start : start + self._pool_blocks]].tolist()
        order = permutation(len(blocks) * self._block_rows, self._seed, ROWS, pool, self._device)
        return *self._load(blocks), order

    def _load(self, blocks):
        """The rows of blocks on the device, after the copy has finished. Raises ValueError if one is not finite."""
        rows = torch.empty(len(blocks), self._block_rows, self.D, dtype=self.dtype, device=self._device)
        n = max(1, self._part_rows // self._block_rows)
        for first in range(0, len(blocks), n):
            if self._closed:
                raise CancelledError
            part = rows[first : first + n]
            part.copy_(self._read(blocks[first : first + n]).view_as(part), non_blocking=True)
        # The sum takes no memory, and one of finite float32 numbers is finite in float64.
        if not rows.sum(dtype=torch.float64).isfinite():
            for block, values in zip(blocks, rows, strict=True):
                for row in (~values.isfinite()).any(1).nonzero()[:1]:
                    raise ValueError(f"NaN or infinity in {self._origin(block, int(row))}")
        return (rows.flatten(0, 1),)


class Shard(NamedTuple):
    path: Path
    start: int  # of the rows, in bytes
    rows: int
    D: int
    dtype: torch.dtype


class Shards(Pools):
    """Rows of ``.npy`` or ``.safetensors`` files, read a block at a time: they may be larger than memory.

    Args:
        path: such a file or a folder of them. Each has one 2-D array ``[rows, D]``, or one called "activations", in
            float16, bfloat16 (safetensors) or float32, all of one width and dtype. Blocks are 256 neighbouring rows; up
            to 255 at the end of the last file are not used.
        batch_size, options: see `Pools`.

    Raises:
        ValueError: a file, which it names, is missing, damaged or does not fit the others, or there are too few rows;
            `batch` and `held_out` raise it for NaN and infinity.
    """

    _block_rows = 256

    def __init__(self, path, batch_size, **options):
        self._name, path = path, Path(path)
        paths = [path]
        if path.is_dir():
            paths = sorted([*path.glob("*.npy"), *path.glob("*.safetensors")])
            if not paths:
                raise ValueError(f"{path}: has no .npy or .safetensors file")
        self._shards = [open_shard(file) for file in paths]
        first = self._shards[0]
        self.D, self.dtype = first.D, first.dtype
        for shard in self._shards:
            if (shard.D, shard.dtype) != (self.D, self.dtype):
                expected = f"{first.path} has {self.dtype} of width {self.D}"
                raise ValueError(f"{shard.path}: has {shard.dtype} of width {shard.D}, but {expected}")
        self._ends = list(itertools.accumulate(shard.rows for shard in self._shards))
        super().__init__(self._ends[-1] // 256, batch_size, **options)

    def _read(self, blocks):
        rows = torch.empty(len(blocks), 256, self.D, dtype=self.dtype, pin_memory=self._device.type == "cuda")
        for block, out in zip(blocks, rows.view(torch.uint8).numpy(), strict=True):
            done = 0
            while done < 256:  # a block may go on in the next file
                shard, row = self._place(block * 256 + done)
                part = out[done : done + shard.rows - row]
                with shard.path.open("rb") as file:
                    file.seek(shard.start + row * part.shape[1])
                    if file.readinto(part) < part.size:
                        raise ValueError(f"{shard.path}: has become shorter")
                done += len(part)
        return rows

    def _place(self, row):
        """The shard that has this row of all, and which row of that shard it is."""
        shard = bisect.bisect_right(self._ends, row)
        return self._shards[shard], row - self._ends[shard] + self._shards[shard].rows

    def _origin(self, block, row):
        shard, row = self._place(block * 256 + row)
        return f"{shard.path}, row {row}"


def open_shard(path):
    """The `Shard` of a file. Raises ValueError if it is not a whole one."""
    try:
        if path.suffix == ".npy":
            array = np.lib.format.open_memmap(path, mode="r")
            shape, start, dtype = array.shape, array.offset, array.dtype.str
            if start + array.nbytes != path.stat().st_size:
                raise ValueError("its size is not what its header says")
            if not array.flags.c_contiguous:
                raise ValueError("it is in Fortran order")
        elif path.suffix == ".safetensors":
            shape, start, dtype = safetensors_header(path)
        else:
            raise ValueError("neither a folder nor .npy nor .safetensors")
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{path}: must be [rows, D], is {list(shape)}")
    if dtype not in DTYPES:
        raise ValueError(f"{path}: must be float16, bfloat16 or float32, is {dtype}")
    return Shard(path, start, *shape, DTYPES[dtype])


def safetensors_header(path):
    """The shape of the tensor in a file, where it starts, and the name of its dtype."""
    safetensors = needs("safetensors")
    try:
        with safetensors.safe_open(path, "numpy"), path.open("rb") as file:  # checks the file
            size = int.from_bytes(file.read(8), "little")
            tensors = json.loads(file.read(size))
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    tensors.pop("__metadata__", None)
    if "activations" not in tensors and len(tensors) != 1:
        raise ValueError(f'it has {len(tensors)} tensors, none called "activations"')
    tensor = tensors.get("activations") or next(iter(tensors.values()))
    return tensor["shape"], 8 + size + tensor["data_offsets"][0], tensor["dtype"]


def needs(module):
    """The package that has a module, which is imported."""
    package = module.partition(".")[0]
    try:
        return __import__(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing: pip install {package}") from error
    except ImportError as error:
        raise ValueError(f"{package} cannot be imported: {error}") from error


class ModelActivations(Pools):
    """The output of a layer of a Hugging Face model, computed as it is needed, for all tokens of text but special ones.

    All text is tokenized first and cut into contexts of equal length, which are the blocks; what is left over, at the
    end of a file and every four megabytes in it, is not used. Each rank runs the model on all contexts: to train on
    several GPUs, `save` the activations first.

    Args:
        model: the name or folder of a model and its tokenizer, for AutoModel and AutoTokenizer.
        text: a file or a list of files, plain text in UTF-8, or ``.jsonl`` of objects with "text".
        layer: whose output, from 0: hidden_states[layer + 1] of transformers, before any final norm.
        batch_size, options: see `Pools`.
        context: tokens of a context, special ones included.

    Raises:
        ValueError: a file, the model or one of its layers is missing, or there is too little text.
    """

    def __init__(self, model, text, layer, batch_size, *, context=128, device="cpu", **options):
        transformers = needs("transformers")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model)
            dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
            self._model = transformers.AutoModel.from_pretrained(model, dtype=dtype).to(device).eval()
        except (OSError, ValueError) as error:
            raise ValueError(f"{model}: cannot be loaded: {str(error).strip().partition(chr(10))[0]}") from error
        config = self._model.config
        layers = next((m for m in self._model.modules() if isinstance(m, torch.nn.ModuleList)), [])
        if not 0 <= layer < len(layers):
            raise ValueError(f"{model}: has {len(layers)} layers, numbered from 0, and no layer {layer}")
        if context > getattr(config, "max_position_embeddings", context):
            raise ValueError(f"{model}: takes {config.max_position_embeddings} tokens, not a context of {context}")
        config.use_cache = False
        del layers[layer + 1 :]
        layers[layer].register_forward_hook(self._hook)
        self._contexts, self._positions = tokenize(tokenizer, text, context)
        self.D, self.dtype = config.hidden_size, self._model.dtype
        self._name, self._block_rows = "the text", len(self._positions)
        super().__init__(len(self._contexts), batch_size, device=device, **options)

    def save(self, folder, *, dtype=None, shard_rows=2**18):
        """Write the activations of all contexts, held out ones too, as shards for `Shards`, in the text's order.

        Args:
            dtype: float16, bfloat16 or float32; the activations' own by default.
            shard_rows: how many rows, at most, a shard has; at least those of one context.

        Raises:
            ValueError: the folder has shards already, or dtype has no room for an activation.
            OSError: a shard cannot be written. Those before it are whole, and there is nothing of it.
        """
        safetensors, folder = needs("safetensors.torch"), Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("*.safetensors")):
            raise ValueError(f"{folder}: has shards already")
        n = max(1, shard_rows // self._block_rows)
        for number, blocks in enumerate(torch.arange(len(self._contexts)).split(n)):
            (rows,) = self._result(self._reader.submit(self._load, blocks.tolist()))
            rows = rows.to("cpu", dtype or self.dtype)
            if not rows.isfinite().all():
                raise ValueError(f"{folder}: {dtype} has no room for the largest activations; bfloat16 has")
            file, unfinished = folder / f"{number:05}.safetensors", folder / "unfinished"
            try:
                safetensors.torch.save_file({"activations": rows}, unfinished)
                unfinished.replace(file)
            except (OSError, safetensors.SafetensorError) as error:
                unfinished.unlink(missing_ok=True)
                raise OSError(f"{file}: cannot be written: {error}; {number} shards are finished") from error

    def _hook(self, module, inputs, output):
        self._output = output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def _read(self, blocks):
        self._model(self._contexts[blocks].to(self._device, torch.long))
        return self._output[:, self._positions.start : self._positions.stop].flatten(0, 1)

    def _origin(self, block, row):
        return f"the model's activations of context {block}, token {self._positions[row]}"


def tokenize(tokenizer, text, context):
    """The contexts ``[contexts, context]`` of text files, int32, and the positions of tokens that are not special."""
    separator = tokenizer.eos_token or tokenizer.sep_token or "\n\n"  # between the texts of a .jsonl file
    encoded = tokenizer("a", return_special_tokens_mask=True)
    special, mask = torch.tensor(encoded["input_ids"], dtype=torch.int32), encoded["special_tokens_mask"]
    before, behind = mask.index(0), mask[::-1].index(0)
    n = context - before - behind
    if n < 1:
        raise ValueError(f"a context of {context} tokens has no room beside {before + behind} special ones")
    contexts = []
    for file in [text] if isinstance(text, str | Path) else text:
        try:
            with open(file, encoding="utf-8") as lines:
                pieces = iter(partial(lines.readlines, 2**16), [])
                while texts := list(itertools.islice(pieces, 64)):  # tokenized in parallel
                    if str(file).endswith(".jsonl"):
                        texts = [[json.loads(line)["text"] + separator for line in piece] for piece in texts]
                    encoded = tokenizer(["".join(piece) for piece in texts], add_special_tokens=False, verbose=False)
                    ids = list(itertools.chain.from_iterable(encoded["input_ids"]))
                    tokens = torch.tensor(ids[: len(ids) // n * n], dtype=torch.int32).view(-1, n)
                    ends = special[:before], special[len(special) - behind :]
                    first, last = (end.expand(len(tokens), -1) for end in ends)
                    contexts.append(torch.cat([first, tokens, last], dim=1))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{file}: cannot be read as text: {error!r}") from error
    if not sum(map(len, contexts)):
        raise ValueError(f"the text is shorter than a context of {context} tokens")
    return torch.cat(contexts), range(before, before + n)
