"""Kernels with one thing wrong each, and how that shows."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """What stands once in a file of csrc/cuda, what a mutant has instead, and who notices.

    Attributes:
        unit: the translation unit that is compiled anew.
        check: the first check of check_kernels that it runs, by what the check's name begins with.
        shows: how, in the program's words.
    """

    file: str
    before: str
    after: str
    unit: str
    check: str
    shows: str


ENERGY, UPDATE, PRODUCT = "energy: element", "gram: element", "product: element"
OUTSIDE = "memory that is not the kernel's"
PIPELINE = "energy fp32 tf32x3 1 193"
BARRIER = "__syncthreads();"

MUTANTS = {
    # Barriers and waits.
    "slabs are read before all have them": Mutant(
        "multiply.cuh", BARRIER + "  // the slabs are there for all", "//", "pair_energy", PIPELINE, ENERGY
    ),
    "the result overwrites slabs in use": Mutant(
        "multiply.cuh", BARRIER + "\n        sums.template store", "sums.template store", "pair_energy", PIPELINE,
        ENERGY,
    ),
    "no wait for a slab": Mutant("multiply.cuh", "cp_async_wait<STAGES - 2>();", "", "pair_energy", PIPELINE, ENERGY),
    "waits for one slab less": Mutant(
        "multiply.cuh", "cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>", "pair_energy", PIPELINE, ENERGY
    ),
    "no empty groups at the end": Mutant(
        "multiply.cuh", "cp_async_commit();  //", "if (depth < width) cp_async_commit();  //", "pair_energy", PIPELINE,
        ENERGY,
    ),
    "copies to the slab in use": Mutant(
        "multiply.cuh", "fetch(depth + (STAGES - 1) * DEPTH, free)", "fetch(depth + (STAGES - 1) * DEPTH, stage)",
        "pair_energy", PIPELINE, ENERGY,
    ),
    "products are read before they are stored": Mutant(
        "pairs.cuh", BARRIER + "\n    const auto* products", "const auto* products", "pair_energy", PIPELINE, ENERGY
    ),
    "sums over columns are read before they are stored": Mutant(
        "pairs.cuh", "= col_sums[c];\n        " + BARRIER, "= col_sums[c];", "pair_energy", PIPELINE, ENERGY
    ),
    "an update's result is mirrored before it is stored": Mutant(
        "gram.cuh", BARRIER + "\n    // Warps take columns", "// Warps take columns", "gram_update", "update fp32",
        UPDATE,
    ),
    "an update's products are read before they are stored": Mutant(
        "gram.cuh", BARRIER + "\n    Sum* products", "Sum* products", "gram_update", "update fp32", UPDATE
    ),
    "a product's slabs are read before they are stored": Mutant(
        "product.cuh", BARRIER + "  // the slabs are there", "//", "product", "product fp32", PRODUCT
    ),
    "a product's result overwrites slabs in use": Mutant(
        "product.cuh", BARRIER + "\n    Sum* result", "Sum* result", "product", "product fp32", PRODUCT
    ),
    "a product's result is read before it is stored": Mutant(
        "product.cuh", "(result);\n    " + BARRIER, "(result);", "product", "product fp32", PRODUCT
    ),
    "a product's slabs are in one place": Mutant("product.cuh", "stage ^= 1;", "", "product", "product fp32", PRODUCT),
    # Masks.
    "rows past the last are copied": Mutant(
        "multiply.cuh", "there_(steps_within(n - first - own_row(), APART, EACH))", "there_(EACH)", "pair_energy",
        "energy fp32 ieee 1 131", OUTSIDE,
    ),
    "columns past the last are copied": Mutant(
        "multiply.cuh", "depth < left_ ? there_ : 0", "there_", "pair_energy", "energy fp32 ieee 1 67", ENERGY
    ),
    "one step too many": Mutant(
        "multiply.cuh", "(int(size) + step - 1) / step", "int(size) / step + 1", "product", "product fp32", OUTSIDE
    ),
    "pairs below the diagonal": Mutant(
        "pairs.cuh", "if (i < j && j < n)", "if (i != j && j < n)", "pair_energy", "energy fp32 ieee 1 67", ENERGY
    ),
    "pairs past the last column": Mutant(
        "pairs.cuh", "if (i < j && j < n)", "if (i < j)", "pair_energy", "energy fp64 1 12", ENERGY
    ),
    "an update's pairs past the last column": Mutant(
        "gram.cuh", "if (i <= j && j < n)", "if (i <= j)", "gram_update", "update fp32", OUTSIDE
    ),
    "elements past the last row are read": Mutant(
        "gram.cuh", "i < j && j < n ? matrix", "j < n ? matrix", "gram_update", "update fp32", OUTSIDE
    ),
    "elements past the last column are read": Mutant(
        "gram.cuh", "i < j && j < n ? matrix", "i < j ? matrix", "gram_update", "update fp32", OUTSIDE
    ),
    "sums of rows past the last": Mutant(
        "pairs.cuh", "if (i < n) to[tile.col * n + i] = down + across", "to[tile.col * n + i] = down + across",
        "pair_energy", "energy fp32 tf32x3 1 1 7", OUTSIDE,
    ),
    "sums of columns past the last": Mutant(
        "pairs.cuh", "if (j < n) to[tile.row", "to[tile.row", "pair_energy", "energy fp32 tf32x3 3 65", ENERGY
    ),
    "data of rows past the last": Mutant(
        "pairs.cuh", "if (i >= n) return {};", "", "pair_energy", "energy fp32 tf32x3 1 1 7", OUTSIDE
    ),
    "rows past the last are packed": Mutant(
        "rows.cuh", "if (place >= weight.count * n) return;", "", "stages", "energy fp32", OUTSIDE
    ),
    "columns past the last are packed": Mutant(
        "rows.cuh", "if (k < d) x = row[k * step];", "x = row[k * step];", "stages", "energy fp32 ieee 1 67", OUTSIDE
    ),
    "sums past the last are looked at": Mutant(
        "near_pairs.cuh", "here && partial[here ? place : 0]", "partial[place]", "stages", "energy fp32", OUTSIDE
    ),
    "near pairs past the last column": Mutant(
        "near_pairs.cuh", "j < n && j < (tile", "j < (tile", "stages", "energy fp32 ieee 1 67", OUTSIDE
    ),
    "energies past the last": Mutant(
        "near_pairs.cuh", "if (place >= count * n) return;", "", "stages", "energy fp32", OUTSIDE
    ),
    "mirrored elements past the last": Mutant(
        "gram.cuh", "if (i < j && j < n)", "if (i < j)", "gram_update", "update fp32", OUTSIDE
    ),
    "a product's rows past the last": Mutant(
        "product.cuh", "rows_left_ > 0 ? steps_within(cols_left, COLS_APART, EACH) : 0",
        "true ? steps_within(cols_left, COLS_APART, EACH) : 0", "product", "product fp32", OUTSIDE,
    ),
    "a product's depth past the last": Mutant(
        "product.cuh", "cols_left > 0 ? steps_within(rows_left_, ROWS_APART, EACH) : 0",
        "true ? steps_within(rows_left_, ROWS_APART, EACH) : 0", "product", "product fp32", OUTSIDE,
    ),
    "elements of a product past the last column": Mutant(
        "product.cuh", "if (i >= rows || j >= cols) continue;", "if (i >= rows) continue;", "product", "product fp32",
        OUTSIDE,
    ),
    "elements of a product past the last row": Mutant(
        "product.cuh", "if (i >= rows || j >= cols) continue;", "if (j >= cols) continue;", "product", "product fp32",
        OUTSIDE,
    ),
    # Fragments and places.
    "columns of a's fragment swapped": Mutant(
        "multiply.cuh", "a[i][2] = word(left, row, chunk + 1, q)", "a[i][2] = word(left, row + 8, chunk, q)",
        "pair_energy", PIPELINE, ENERGY,
    ),
    "halves of b's fragment swapped": Mutant(
        "multiply.cuh", "b[j][1] = word(right, row, chunk + 1, q)", "b[j][1] = word(right, row, chunk, q)",
        "pair_energy", PIPELINE, ENERGY,
    ),
    "elements of c's fragment swapped": Mutant(
        "multiply.cuh", "2 * q + e % 2;", "2 * q + e / 2;", "pair_energy", PIPELINE, ENERGY
    ),
    "chunks copied to where they are not looked for": Mutant(
        "multiply.cuh", "offset_(chunk_offset(own_row(), own_chunk()))",
        "offset_(own_row() * SLAB_BYTES + own_chunk() * CHUNK_BYTES)", "pair_energy", PIPELINE, ENERGY,
    ),
    "one of three products missing": Mutant(
        "multiply.cuh", "mma(sums_[i][j], a_small, b_big[j]);", "", "pair_energy", PIPELINE, ENERGY
    ),
    "the mirrored half is not written": Mutant(
        "gram.cuh", "if (i < j && j < n)\n", "if (false)\n", "gram_update", "update fp32", UPDATE
    ),
    "the diagonal is not the one given": Mutant(
        "gram.cuh", "sum = i == j ? diagonal[i] : old[r][c] + sum", "sum = old[r][c] + sum", "gram_update",
        "update fp32", UPDATE,
    ),
    # The near rule, rounding, launches.
    "near pairs are not found": Mutant(
        "riesz.cuh", "half_square < float(0.5 * NEAR) ?", "false ?", "pair_energy", "energy fp32 ieee 1 67", ENERGY
    ),
    "a row is near itself": Mutant(
        "near_pairs.cuh", "if (i == j) continue;", "", "stages", "energy fp64 1 12", ENERGY
    ),
    "fp16 is rounded twice": Mutant(
        "elements.cuh", "__float2half(to_odd(x))", "__float2half(float(x))", "product", "product rounds", PRODUCT
    ),
    "bf16 is rounded twice": Mutant(
        "elements.cuh", "__float2bfloat16(to_odd(x))", "__float2bfloat16(float(x))", "product", "product rounds",
        PRODUCT,
    ),
    "shared memory is not asked for": Mutant(
        "launching.cuh", "if (shared_bytes > 48 << 10)", "if (false)", "pair_energy", PIPELINE, "not asked for"
    ),
    # Offsets of 32 bits.
    "a narrow offset of a packed row": Mutant(
        "rows.cuh", "packed[place * width + k] = x", "packed[int(place * width + k)] = x", "stages", "far energy", ""
    ),
    "a narrow offset of a copied row": Mutant(
        "multiply.cuh", "from_(matrix + (first + own_row()) * width +",
        "from_(matrix + int((first + own_row()) * width) +", "pair_energy", "far energy", "",
    ),
    "a narrow offset of a tile's sum": Mutant(
        "pairs.cuh", "to[tile.col * n + i] = down + across", "to[int(tile.col * n + i)] = down + across", "pair_energy",
        "far energy", "",
    ),
    "a narrow offset of a summed tile": Mutant(
        "near_pairs.cuh", "partial[(place / n * tiles + t) * n + place % n]",
        "partial[int((place / n * tiles + t) * n + place % n)]", "stages", "far energy", "",
    ),
    "a narrow offset of a matrix": Mutant(
        "gram.cuh", "matrix[i * down + j * across] =", "matrix[int(i * down + j * across)] =", "gram_update",
        "far update", "",
    ),
    "a narrow offset of an element that is read": Mutant(
        "gram.cuh", "? matrix[i * down + j * across]", "? matrix[int(i * down + j * across)]", "gram_update",
        "far update", "",
    ),
    "a narrow offset of a mirrored element": Mutant(
        "gram.cuh", "matrix[j * gram.first.row_stride +", "matrix[int(j * gram.first.row_stride) +", "gram_update",
        "far update", "",
    ),
    "a narrow offset of a product": Mutant(
        "product.cuh", "const int64_t offset = i *", "const int offset = i *", "product", "far product", ""
    ),
}  # fmt: skip

# What no value shows: threads of a warp, and blocks, that write to one place.
RACES = {
    "all lanes write one sum": Mutant(
        "near_pairs.cuh", "if (int(threadIdx.x % 32) == lane) partial", "partial", "stages", "energy fp32 ieee 1 67",
        "data race",
    ),
    "two tiles write one sum": Mutant(
        "pairs.cuh", "if (j < n) to[tile.row", "to[tile.row", "pair_energy", "energy fp32 ieee 1 67", "data race"
    ),
}  # fmt: skip
