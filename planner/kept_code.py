"""Memory that the CPU's library keeps for every distinct bfloat16 product it has run: measured, because no closed form is known.

oneDNN holds on to what it made for a product (rows, inputs, outputs, with or without bias): about 590 KiB of
descriptors, and kernels in machine code that grow with how far it unrolled. It unrolls by blocks of rows, inputs and
outputs that its heuristics choose over all three, the threads and the cache sizes, so the size jumps; it settles from
some 600 rows on. Two rules hold throughout:

    rows that are no multiple of 32 need kernels of their own for the rest t = rows mod 32: of the code proper,
    0.40 + 0.0145 t more, 0.17 of it more from 17 on (a second tile of 16 rows), and 0.25 more where t is 27
    without bias 0.78 of the code (the bias is summed into the output, which takes other stores)

float32 products (MKL) keep no code per shape, but the buffers they pack operands in (`float32_bytes`). A product that was
run before keeps nothing more, whatever its weights.
Measured 2026-11-22 with torch 2.13.0 (oneDNN 3.12), 2 cores with AMX, 2 MiB second-level cache a core, 2 threads: growth of
anonymous memory at the first call of 4,043 shapes, in processes with malloc's thresholds at 64 KiB. Against those: mean
absolute error 36 KiB, standard deviation 116 KiB a shape; worst 2 MiB (1280 to 3420 over odd rows).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import lru_cache
from typing import NamedTuple

from planner.plan.shapes import ModelShape
from planner.units import KIB

ONE_ROW = 584 * KIB  # a matrix-vector product: descriptors, and hardly any code
FEW_OUTPUTS = 650 * KIB  # both widths below 512: at most 100 KiB of code
DESCRIPTORS = {True: 592, False: 580}  # KiB, with and without bias
DESCRIPTOR_BYTES = 586 * KIB
UNBIASED = 0.78  # of the code
WITHOUT_AMX, WITHOUT_AMX_RAGGED = 660 * KIB, 840 * KIB  # ragged: outputs that are no multiple of 32
TILE = 32
SETTLED = 640  # rows
KEY_BLOCK = 512
PACKED_ROWS = 128  # of float32 products

# inputs, outputs, + with or - without bias; then `up to these rows: KiB` for multiples of 32; then, behind |, for the 31 row
# counts below a multiple of 32 where the rule for the rest is off by more than 150 KiB: `multiple:KiB where t <= 16/KiB above`
_MEASURED = """
 1176  1280 - 64:610 224:704 384:812 512:904 544:1024 576:780 608:1064 2048:764 4096:1066 | 288:780/832 320:808/832 352:0/868 384:0/852 448:880/936 480:912/960 512:924/984 544:0/1028
 1280  3840 + 32:596 160:758 256:852 384:948 448:1026 480:1192 512:884 544:1244 576:908 608:1292 640:920 672:1344 704:964 736:1400 768:984 800:1444 832:1008 864:1500 896:1032 928:1288 960:936 1024:1332 1056:956 1120:1386 1152:980 1216:1436 1248:1000 1312:1494 1344:1036 1376:1348 1408:956 1504:1370 1536:988 1632:1420 1664:1020 1760:1482 1792:1036 1888:1378 4096:856 | 96:0/756 224:840/876 256:0/888 320:920/956 352:944/984 384:976/988 416:996/1060 448:1024/1092 480:0/1216
 1280  2560 + 32:596 160:756 256:848 352:928 448:1016 480:1184 512:868 544:1248 576:904 608:1300 640:932 672:1348 704:960 736:1400 768:980 800:1440 832:1012 864:1512 896:1036 928:1296 960:940 1024:1336 1056:952 1120:1380 1152:984 1216:1444 1248:1012 4096:1172 | 96:0/744 224:848/876 256:0/884 320:912/960 352:948/988 384:976/980 416:996/1072 448:1024/1088 480:0/1212
 1280  1280 + 32:596 128:748 256:832 384:940 448:1020 480:1188 512:868 544:1240 576:912 608:1292 2112:826 2240:1328 2304:988 2464:1414 2496:1004 4096:1206 | 192:816/844 224:0/884 320:924/960 352:944/996 384:976/988 416:1000/1068 448:1036/1084 480:0/1216
 1280  3420 + 32:636 96:932 160:1028 224:1134 288:1242 352:1338 416:1444 448:1528 480:1828 512:1220 544:1948 576:1276 608:2036 640:1312 672:2144 704:1368 736:2252 768:1416 800:2356 832:1488 864:2468 896:1532 928:2036 960:1320 1024:2120 1056:1380 1120:2222 1152:1424 1216:2342 1248:1480 1312:2444 1344:1532 1376:2136 1408:1380 1472:2178 1504:2260 1536:1420 1600:2278 1632:2352 1664:1472 1696:2360 4096:1186 | 96:928/1080 128:984/1072 160:1032/1860 192:1080/0 224:1140/1368 256:1184/1240 288:1240/1416 320:1284/3004 352:1348/1576 384:1396/1440 416:1464/1620 448:1520/3892 480:1812/2032 576:0/2136 608:0/2196 640:0/3760
 3420  1280 + 32:620 96:770 128:836 224:1462 320:1346 4096:2210 | 160:2108/2288 352:3212/3676
 5120  5120 + 32:624 64:720 96:1124 128:1648 160:1384 192:1272 224:1920 256:964 288:1340 320:1940 4096:1734 | 96:2480/2988 128:1492/0 160:2340/0 192:3216/3508 224:1768/0 256:2904/1336 288:0/2024 320:1788/3132
 5120  2048 + 32:624 64:760 96:1120 128:1644 160:1444 192:2264 224:1388 256:2136 4096:1284 | 96:2480/2996 128:1484/0 160:2336/0 192:3408/3756 224:1944/2112 256:1932/3508 288:1732/1944
 5120  3584 + 32:628 64:716 96:1120 128:1616 160:1068 192:1288 224:1920 256:1172 288:1728 4096:1298 | 96:4428/1732 128:2300/2620 160:1404/0 192:2192/2384 224:1764/0 256:2896/1728 288:0/2780
 2048  2048 + 32:596 160:758 256:844 288:908 320:2136 4096:1282 | 96:0/744 224:848/868 256:0/884 320:3216/3508 352:1736/1936
 2048   256 + 32:584 96:1112 192:862 224:936 704:1114 4096:852 | 128:812/828 160:848/872 192:0/920 256:964/988
 2048 11008 - 64:614 224:710 288:776 352:1452 480:962 512:760 544:1020 576:796 704:962 768:776 960:986 1152:778 1280:964 1536:772 3072:992 4096:920 | 320:2092/2284 384:1240/0 608:1232/1352
11008  2048 - 32:640 128:1340 224:1646 4096:1742 | 64:1136/0 160:0/2804 256:0/2800
 3584  3584 + 128:642 192:1062 256:1256 320:1146 4096:2090 | 160:1368/1508 224:0/1916 352:3036/3440
 3584   512 + 96:642 128:696 352:1460 384:908 4096:1250 | 160:1972/2220 384:1996/2220 416:1688/1860
 3584 18944 - 128:602 160:948 256:1088 288:1136 320:960 352:1056 4096:2536 | 160:1812/1320 192:1584/1728 352:1408/1512 384:3788/4308
18944  3584 - 32:708 64:1500 128:1334 160:920 192:1632 224:1484 256:984 288:1344 4096:2904 | 64:1992/0 96:3256/2224 160:1816/0 192:0/1828 224:1428/1544 256:2144/2252 288:0/2064 320:4316/4988
 1176   640 - 64:606 224:708 4096:772 | 608:1052/0 640:1068/1120
  640  1920 + 128:626 352:710 608:794 832:892 896:952 2560:810 4096:916 | 416:768/788 448:0/808 480:0/816
  640  1280 + 96:614 352:704 576:798 4096:840 | 416:760/784 448:0/800 480:0/820 512:0/828 640:840/884
  640   640 + 128:622 544:712 608:750 4096:868
  640  1716 + 32:620 160:760 288:860 384:936 512:1026 640:1124 768:1238 832:1316 2048:1418 2560:1156 3072:1268 4096:1418 | 160:0/1112 224:832/920 256:836/876 288:0/948 320:0/1592 352:936/1016 384:948/960 416:984/1040 448:996/1964 480:1032/0 512:1052/2172 544:1084/0 576:1104/1240 608:1132/2448 640:1152/2544
 1716   640 + 32:592 128:744 192:880 256:964 288:1028 4096:886 | 192:892/928 224:0/964 256:972/996 288:1008/1088 320:0/972
 2560  2560 + 32:604 160:756 224:836 256:960 320:1334 4096:1902 | 96:0/740 224:836/872 256:1248/1332 288:0/2016 352:2756/3080
 2560  1024 + 32:608 96:768 224:842 320:914 384:1240 4096:1924 | 160:0/888 224:832/876 256:1212/1280 352:0/1828 416:2772/3128
 1024  1024 + 32:588 160:762 288:854 416:944 480:1024 4096:876 | 96:0/740 128:0/764 224:840/860 256:856/876 288:0/940 352:936/976 384:952/972 416:976/1036 448:1008/1060 480:1040/1084
 1024   256 + 32:584 64:720 96:1016 128:692 224:822 4096:756 | 96:732/1460 128:760/1440 192:800/840 224:0/860
 1024  4096 - 64:606 224:698 4096:786 | 288:0/816
 4096  1024 - 32:588 96:686 160:1288 4096:1128 | 128:0/1916 192:1676/1876
"""


class _Sizes(NamedTuple):
    biased: bool
    rows: tuple[int, ...]
    kib: tuple[int, ...]
    rests: dict[int, tuple[int, int]]


def _parse(line: str) -> tuple[tuple[int, int], _Sizes]:
    inputs, outputs, sign, *pairs = line.split()
    cut = pairs.index("|") if "|" in pairs else len(pairs)
    steps = [pair.split(":") for pair in pairs[:cut]]
    rests = {}
    for pair in pairs[cut + 1 :]:
        upper, _, both = pair.partition(":")
        low, high = both.split("/")
        rests[int(upper)] = int(low), int(high)
    sizes = _Sizes(
        sign == "+", tuple(int(rows) for rows, _ in steps), tuple(int(k) for _, k in steps), rests
    )
    return (int(inputs), int(outputs)), sizes


_TABLE = dict(_parse(line) for line in _MEASURED.strip().splitlines())


def biases(model: ModelShape, inputs: int, outputs: int) -> tuple[bool, ...]:
    """With and without bias, whichever the model's products of these widths have: what is kept is kept for each."""
    vision, text = model.vision, model.text
    width, wide = vision.hidden, vision.merge**2 * vision.hidden
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    biased = {
        *((width, 3 * width), (width, 2 * width), (width, width)),
        *((width, vision.intermediate), (vision.intermediate, width)),
        *((wide, wide), (wide, vision.out_hidden)),
        *((text.hidden, queries), (text.hidden, keys)),
    }
    plain = {
        (vision.patch_values, width),
        (queries, text.hidden),
        *((text.hidden, text.intermediate), (text.intermediate, text.hidden)),
    }
    found = ((inputs, outputs) in biased, (inputs, outputs) in plain)
    # what is in neither is a row tile of lm_head
    return (*((True,) if found[0] else ()), *((False,) if found[1] or not found[0] else ()))


@lru_cache(maxsize=8192)
def kept_bytes(rows: int, inputs: int, outputs: int, *, bias: bool, amx: bool = True) -> int:
    """Bytes kept for a bfloat16 product (rows, inputs) x (inputs, outputs), from its first call to the process's end.

    Widths that were not measured take the figures of the nearest measured pair, ragged ones (no multiples of 32) those of
    the nearest ragged one. Without AMX (measured with oneDNN held to AVX512_CORE_BF16) rows and inputs do not matter:
    within 50 KiB.
    """
    if not amx:
        return WITHOUT_AMX_RAGGED if outputs % TILE else WITHOUT_AMX
    if rows == 1:
        return ONE_ROW
    if max(inputs, outputs) < 512:
        return FEW_OUTPUTS
    sizes = _TABLE.get((inputs, outputs)) or _TABLE[_nearest(inputs, outputs)]
    base = DESCRIPTORS[sizes.biased]
    code = _kib(sizes, rows, outputs, base) - base
    if bias != sizes.biased:
        code *= UNBIASED if sizes.biased else 1 / UNBIASED
    return round((DESCRIPTORS[bias] + code) * KIB)


def float32_bytes(model: ModelShape, prompt_rows: int, patches: int) -> int:
    """Bytes of the buffers that MKL packs float32 products in and keeps: 384 columns of both operands of the largest, twice.

    (Measured 1.8 to 2.1 times: a product that does not fit the kept buffers takes new ones.) Tiles below 128 rows are not
    packed and keep less; the figure is the same for every tile, so that one request has one.
    """
    vision, text = model.vision, model.text
    largest = _packed_bytes(prompt_rows, text.intermediate)
    if patches:
        widest = max(3 * vision.hidden, vision.intermediate, vision.merge**2 * vision.hidden)
        largest = max(largest, _packed_bytes(patches, widest))
    return 2 * largest


def _packed_bytes(rows: int, outputs: int) -> int:
    return 0 if rows < PACKED_ROWS else 4 * 384 * (outputs + min(rows, 755))


@lru_cache(maxsize=8192)
def attention_kept_bytes(rows: int, keys: int, *, first: bool) -> int:
    """Bytes kept for the products of a bfloat16 attention call over that many query rows and keys, with AMX.

    The kernel cuts queries into blocks of 256 rows (64 below 768, 32 below 192) and keys into blocks of 512
    (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp), and multiplies blocks and what is left over of both with kernels
    of their own. `first`: no other call shares its whole blocks. Head sizes of 80 and 128, 1 to 4,600 rows and keys:
    within 350 KiB.
    """
    block, scale = (256, 1.0) if rows >= 768 else (64, 0.38) if rows >= 192 else (32, 0.2)
    rest_rows, rest_keys = rows % block, keys % KEY_BLOCK
    kib = 0.0
    if first and rows >= block:
        kib += scale * (500 * (keys >= KEY_BLOCK) + (128 + 1.3 * rest_keys) * (rest_keys > 0))
    if rest_rows:
        left_over = 100 + 1.9 * rest_rows
        kib += left_over * (keys >= KEY_BLOCK)
        kib += (left_over * rest_keys / KEY_BLOCK + 40) * (rest_keys > 0)
    return round(kib * KIB)


def _kib(sizes: _Sizes, rows: int, outputs: int, base: int) -> float:
    rest = rows % TILE
    upper = _step(sizes, rows)
    if not rest:
        return upper
    low, high = sizes.rests.get(rows - rest + TILE, (0, 0))
    if rest <= 16 and low:
        return low
    if rest > 16 and high:
        return high
    lower = _step(sizes, rows - rest)
    if rows < TILE:
        return upper
    share = 0.40 + 0.0145 * rest + 0.17 * (rest > 16) + 0.25 * (rest == 27)
    whole = min(lower, upper)
    if rows > SETTLED and not outputs % TILE:
        # where the library cuts rows into odd blocks, multiples of 32 have a rest too; the least of those around has none
        whole = min(whole, _step(sizes, rows - rest - TILE), _step(sizes, rows - rest + 2 * TILE))
    return max(lower, upper, base + (whole - base) * (1 + share))


def _step(sizes: _Sizes, rows: int) -> int:
    return sizes.kib[min(bisect_left(sizes.rows, rows), len(sizes.kib) - 1)]


def _nearest(inputs: int, outputs: int) -> tuple[int, int]:
    def distance(pair: tuple[int, int]) -> tuple[float, tuple[int, int]]:
        ragged = [
            (a % TILE > 0) != (b % TILE > 0) for a, b in zip(pair, (inputs, outputs), strict=True)
        ]
        ratios = abs(math.log(pair[0] / inputs)) + abs(math.log(pair[1] / outputs))
        return ratios + sum(ragged), pair

    return min(_TABLE, key=distance)
