/* A step's work beside its matrix products, for CPUs with AVX512-BF16. Built, loaded and called by kernels.py.

   Always holds: activations and their gradients are bf16, all arithmetic is fp32; no sum is shared by threads, so any
   number of them gives the same bits. Callers check shapes: H is a multiple of 16, D of 32. */

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
typedef uint8_t flag; /* 0 or 1 */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE __m512 all(float x) { return _mm512_set1_ps(x); }
INLINE __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
INLINE __m256i narrowed(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
INLINE __m512 load(const bf16 *x) { return widened(_mm256_loadu_si256((const void *)x)); }
INLINE void store(bf16 *x, __m512 value) { _mm256_storeu_si256((void *)x, narrowed(value)); }

INLINE long rounded_up(long x, long to) { return (x + to - 1) / to * to; }
INLINE __mmask16 first(long n) { return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }

/* Which of 16 units stay; those in `there`, where nothing is dropped. */
INLINE __mmask16 kept(const flag *keep, __mmask16 there) {
    if (!keep) return there;
    __m128i flags = _mm_maskz_loadu_epi8(there, keep);
    return _mm_test_epi8_mask(flags, flags);
}

/* e^x for x up to 0, within 2e-7 of it: Cody and Waite's reduction, then the polynomial of Cephes' expf. Of two operands
   one of which is no number, max takes the second: what overflowed must come out as NaN. */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(all(-87), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, all(1.42860677e-6f), _mm512_fnmadd_ps(n, all(0.693145752f), x));
    __m512 p = all(1.98756912e-4f);
    p = _mm512_fmadd_ps(p, r, all(1.39819995e-3f));
    p = _mm512_fmadd_ps(p, r, all(8.33345205e-3f));
    p = _mm512_fmadd_ps(p, r, all(4.16657962e-2f));
    p = _mm512_fmadd_ps(p, r, all(1.66666657e-1f));
    p = _mm512_fmadd_ps(p, r, all(0.5f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, all(1)));
    return _mm512_scalef_ps(p, n);
}

/* ---- dropout's masks: masks.py says what is drawn ---- */

/* A block, four words, of Philox4x64-10 (Salmon et al., 2011): that of the counter (c, example, 1, 0). */
INLINE __m256i philox(uint64_t key0, uint64_t key1, uint64_t c, uint64_t example) {
    uint64_t w0 = c, w1 = example, w2 = 1, w3 = 0;
    UNROLL for (int i = 0; i < 10; i++) {
        unsigned __int128 a = (unsigned __int128)w0 * 0xD2E7470EE14C6C93u;
        unsigned __int128 b = (unsigned __int128)w2 * 0xCA5A826395121157u;
        w0 = (uint64_t)(b >> 64) ^ w1 ^ key0, w2 = (uint64_t)(a >> 64) ^ w3 ^ key1;
        w1 = (uint64_t)b, w3 = (uint64_t)a;
        key0 += 0x9E3779B97F4A7C15u, key1 += 0xBB67AE8584CAA73Bu;
    }
    return _mm256_set_epi64x(w3, w2, w1, w0);
}

/* Written past the caches, for what is drawn now is read much later; a fence must follow. */
INLINE void decide(flag *keep, __m256i units, int threshold) {
    __mmask32 some = threshold > 255 ? 0 : 0xffffffff;
    __mmask32 stays = _mm256_mask_cmpge_epu8_mask(some, units, _mm256_set1_epi8((char)threshold));
    _mm256_stream_si256((void *)keep, _mm256_maskz_set1_epi8(stays, 1));
}

/* The units of site s and example e go to places[s, e], a multiple of 32; they are the blocks of that example's stream
   from starts[s, e] to starts[s + 1, e]. keep itself is aligned to 32 bytes. */
void draw_masks(flag *keep, const int64_t *places, const int64_t *starts, const double *p, const int64_t *ids,
                long sites, long examples, long seed, long step) {
#pragma omp parallel for schedule(static, 1)
    for (long job = 0; job < sites * examples; job++) {
        const long site = job / examples, id = ids[job % examples];
        uint64_t words[4];
        _mm256_storeu_si256((void *)words, philox(seed, step, site / 4 + 1, id)); /* numpy counts up before it draws */
        const int threshold = (int)(p[site] * 256 + (double)(words[site % 4] >> 11) * 0x1p-53);
        flag *to = keep + places[job];
        long block = starts[job] + 1;
        const long end = starts[job + examples] + 1;
        for (; block + 1 < end; block += 2, to += 64) { /* two at a time: each waits for its own products */
            __m256i one = philox(seed, step, block, id), other = philox(seed, step, block + 1, id);
            decide(to, one, threshold);
            decide(to + 32, other, threshold);
        }
        if (block < end) decide(to, philox(seed, step, block, id), threshold);
        _mm_sfence();
    }
}

/* ---- residual + dropout(x), and its LayerNorm ---- */

/* Of each row of [T, H]: y = LayerNorm(residual + scale keep x), in fp32 and bf16. For the backward, where it comes:
   `normed`, y before weight and bias, and the factor `inverse` [T] that made it. */
void add_norm(const bf16 *x, const float *residual, const flag *keep, const float *weight, const float *bias, float *y,
              bf16 *y16, bf16 *normed, float *inverse, long T, long H, float scale, float eps) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < T; t++) {
        const long row = t * H;
        __m512 sum = all(0), squares = all(0);
        for (long h = 0; h < H; h += 16) {
            __mmask16 m = kept(keep ? keep + row + h : 0, 0xffff);
            __m512 r = _mm512_loadu_ps(residual + row + h);
            r = _mm512_mask3_fmadd_ps(load(x + row + h), all(scale), r, m);
            _mm512_storeu_ps(y + row + h, r);
            sum = _mm512_add_ps(sum, r);
        }
        __m512 mean = all(_mm512_reduce_add_ps(sum) / H);
        for (long h = 0; h < H; h += 16) {
            __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(y + row + h), mean);
            squares = _mm512_fmadd_ps(centred, centred, squares);
        }
        float factor = 1 / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / H + eps);
        for (long h = 0; h < H; h += 16) {
            __m512 z = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(y + row + h), mean), all(factor));
            __m512 out = _mm512_fmadd_ps(z, _mm512_loadu_ps(weight + h), _mm512_loadu_ps(bias + h));
            _mm512_storeu_ps(y + row + h, out);
            store(y16 + row + h, out);
            if (normed) store(normed + row + h, z);
        }
        if (inverse) inverse[t] = factor;
    }
}

/* From the gradients of y and y16, either of which may be absent, those of the residual and of x. */
void add_norm_backward(const float *of_y, const bf16 *of_y16, const flag *keep, const float *weight, const bf16 *normed,
                       const float *inverse, float *of_residual, bf16 *of_x, long T, long H, float scale) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < T; t++) {
        const long row = t * H;
        float *to = of_residual + row;
        __m512 sum = all(0), along = all(0);
        for (long h = 0; h < H; h += 16) {
            __m512 g = of_y ? _mm512_loadu_ps(of_y + row + h) : all(0);
            if (of_y16) g = _mm512_add_ps(g, load(of_y16 + row + h));
            g = _mm512_mul_ps(g, _mm512_loadu_ps(weight + h));
            _mm512_storeu_ps(to + h, g);
            sum = _mm512_add_ps(sum, g);
            along = _mm512_fmadd_ps(g, load(normed + row + h), along);
        }
        __m512 mean = all(_mm512_reduce_add_ps(sum) / H), slope = all(_mm512_reduce_add_ps(along) / H);
        for (long h = 0; h < H; h += 16) {
            __m512 g = _mm512_sub_ps(_mm512_loadu_ps(to + h), mean);
            g = _mm512_mul_ps(_mm512_fnmadd_ps(slope, load(normed + row + h), g), all(inverse[t]));
            _mm512_storeu_ps(to + h, g);
            __mmask16 m = kept(keep ? keep + row + h : 0, 0xffff);
            store(of_x + row + h, _mm512_maskz_mul_ps(m, g, all(scale)));
        }
    }
}

/* ---- small products: pairs of bf16 along the inner dimension lie in one int32 ---- */

/* c [rows, 16 nv] = a b over k2 pairs; those of a at a[i ra + k ka], those of b at b[k ldb + j]. */
INLINE void tile(float *c, long ldc, const int32_t *a, long ra, long ka, const int32_t *b, long ldb, long k2, int rows,
                 int nv) {
    __m512 sum[6][4];
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int v = 0; v < nv; v++) sum[i][v] = all(0);
    for (long k = 0; k < k2; k++) {
        __m512bh right[4];
        UNROLL for (int v = 0; v < nv; v++) right[v] = (__m512bh)_mm512_loadu_si512(b + k * ldb + 16 * v);
        UNROLL for (int i = 0; i < rows; i++) {
            __m512bh left = (__m512bh)_mm512_set1_epi32(a[i * ra + k * ka]);
            UNROLL for (int v = 0; v < nv; v++) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], left, right[v]);
        }
    }
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int v = 0; v < nv; v++)
        _mm512_storeu_ps(c + i * ldc + 16 * v, sum[i][v]);
}

INLINE void strip(float *c, long ldc, const int32_t *a, long ra, long ka, const int32_t *b, long ldb, long m, long k2,
                  int nv) {
    for (; m >= 6; m -= 6, c += 6 * ldc, a += 6 * ra) tile(c, ldc, a, ra, ka, b, ldb, k2, 6, nv);
    switch (m) {
        case 5: tile(c, ldc, a, ra, ka, b, ldb, k2, 5, nv); break;
        case 4: tile(c, ldc, a, ra, ka, b, ldb, k2, 4, nv); break;
        case 3: tile(c, ldc, a, ra, ka, b, ldb, k2, 3, nv); break;
        case 2: tile(c, ldc, a, ra, ka, b, ldb, k2, 2, nv); break;
        case 1: tile(c, ldc, a, ra, ka, b, ldb, k2, 1, nv); break;
    }
}

/* c [m, n] = a b, see `tile`; n a multiple of 16, rows of b and c n apart. */
static void product(float *c, const int32_t *a, long ra, long ka, const int32_t *b, long m, long n, long k2) {
    for (long j = 0; j < n; j += 64) switch ((n - j) / 16) {
        case 1: strip(c + j, n, a, ra, ka, b + j, n, m, k2, 1); break;
        case 2: strip(c + j, n, a, ra, ka, b + j, n, m, k2, 2); break;
        case 3: strip(c + j, n, a, ra, ka, b + j, n, m, k2, 3); break;
        default: strip(c + j, n, a, ra, ka, b + j, n, m, k2, 4);
    }
}

/* Rows of x [rows, 2 k2] as columns: to [k2, columns], columns a multiple of 16, those behind the rows 0. */
static void transposed(int32_t *to, long columns, const bf16 *x, long stride, long rows, long k2) {
    for (long i = 0; i < columns; i += 16) for (long k = 0; k < k2; k += 16) {
        __m512i a[16], b[16];
        UNROLL for (int r = 0; r < 16; r++)
            a[r] = i + r < rows ? _mm512_loadu_si512(x + (i + r) * stride + 2 * k) : _mm512_setzero_si512();
        UNROLL for (int r = 0; r < 16; r += 2)
            b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]), b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
        UNROLL for (int r = 0; r < 16; r += 4) UNROLL for (int c = 0; c < 2; c++) {
            a[r + 2 * c] = _mm512_unpacklo_epi64(b[r + c], b[r + c + 2]);
            a[r + 2 * c + 1] = _mm512_unpackhi_epi64(b[r + c], b[r + c + 2]);
        }
        /* a[4 g + c] has columns c, c + 4, c + 8 and c + 12 of rows 4 g to 4 g + 3 */
        UNROLL for (int c = 0; c < 4; c++) {
            __m512i even0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88),
                    even1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
            __m512i odd0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd),
                    odd1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
            int32_t *at = to + (k + c) * columns + i;
            _mm512_storeu_si512(at, _mm512_shuffle_i32x4(even0, even1, 0x88));
            _mm512_storeu_si512(at + 4 * columns, _mm512_shuffle_i32x4(odd0, odd1, 0x88));
            _mm512_storeu_si512(at + 8 * columns, _mm512_shuffle_i32x4(even0, even1, 0xdd));
            _mm512_storeu_si512(at + 12 * columns, _mm512_shuffle_i32x4(odd0, odd1, 0xdd));
        }
    }
}

INLINE __m512i pairs_of(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

/* Rows of x [rows, n] two by two: to [rows / 2, n]; behind an odd number of rows come zeros. */
static void coupled(int32_t *to, const bf16 *x, long stride, long rows, long n) {
    for (long i = 0; i < rows; i += 2, x += 2 * stride, to += n) for (long c = 0; c < n; c += 16) {
        __m256i even = _mm256_loadu_si256((const void *)(x + c)), odd = _mm256_setzero_si256();
        if (i + 1 < rows) odd = _mm256_loadu_si256((const void *)(x + stride + c));
        _mm512_storeu_si512(to + c, pairs_of(even, odd));
    }
}

static void put(bf16 *to, long stride, const float *c, long rows, long n, float scale) {
    for (long i = 0; i < rows; i++) for (long k = 0; k < n; k += 16)
        store(to + i * stride + k, _mm512_mul_ps(_mm512_loadu_ps(c + i * n + k), all(scale)));
}

/* ---- attention among the tokens of each example ---- */

/* What a thread works in, on one head of an example: each part has 4 n max(n, D) bytes, n a multiple of 16. */
typedef struct {
    int32_t *packed, *scores_by_column, *shares_by_column;
    float *product;
    bf16 *rows;
} Room;

static Room own_part(char *room, long part) {
    room += omp_get_thread_num() * 5 * part;
    return (Room){(void *)room, (void *)(room + part), (void *)(room + 2 * part), (void *)(room + 3 * part),
                  (void *)(room + 4 * part)};
}

/* The examples: where the tokens of each begin, the squared lengths of those before, and where its flags begin. Its shares
   and its flags are [heads, n, n]. And where `threads` work: five parts each. */
#define EXAMPLES \
    const int64_t *starts, const int64_t *lengths, const int64_t *squares, const int64_t *flags, char *memory, \
        long examples, long threads, long part

/* x [n] to softmax(scaling x), 0 behind n up to a multiple of 16. */
INLINE void softmax(float *x, long n, float scaling) {
    __m512 top = all(-__builtin_inff()), sum = all(0);
    for (long j = 0; j < n; j += 16) top = _mm512_mask_max_ps(top, first(n - j), top, _mm512_loadu_ps(x + j));
    __m512 highest = all(scaling * _mm512_reduce_max_ps(top));
    for (long j = 0; j < n; j += 16) {
        __m512 e = exponential(_mm512_fmsub_ps(_mm512_loadu_ps(x + j), all(scaling), highest));
        e = _mm512_maskz_mov_ps(first(n - j), e);
        _mm512_storeu_ps(x + j, e);
        sum = _mm512_add_ps(sum, e);
    }
    __m512 factor = all(1 / _mm512_reduce_add_ps(sum));
    for (long j = 0; j < n; j += 16) _mm512_storeu_ps(x + j, _mm512_mul_ps(_mm512_loadu_ps(x + j), factor));
}

/* qkv [T, 3, heads, D] -> y [T, heads, D]. `shares`, unless it is absent, takes the softmax before dropout. */
void attention(const bf16 *qkv, bf16 *y, bf16 *shares, const flag *keep, EXAMPLES, long heads, long D, float scaling,
               float scale) {
    const long stride = 3 * heads * D;
#pragma omp parallel num_threads(threads)
    {
        Room room = own_part(memory, part);
#pragma omp for schedule(dynamic)
        for (long job = 0; job < examples * heads; job++) {
            const long e = job / heads, h = job % heads, n = lengths[e], wide = rounded_up(n, 16);
            const bf16 *q = qkv + starts[e] * stride + h * D, *k = q + heads * D, *v = k + heads * D;
            transposed(room.packed, wide, k, stride, n, D / 2);
            product(room.product, (const int32_t *)q, stride / 2, 1, room.packed, n, wide, D / 2);
            for (long i = 0; i < n; i++) {
                softmax(room.product + i * wide, n, scaling);
                for (long j = 0; j < n; j += 16) {
                    const long unit = (h * n + i) * n + j;
                    __m256i share = narrowed(_mm512_loadu_ps(room.product + i * wide + j));
                    if (shares) _mm256_mask_storeu_epi16(shares + squares[e] * heads + unit, first(n - j), share);
                    share = _mm256_maskz_mov_epi16(kept(keep ? keep + flags[e] + unit : 0, first(n - j)), share);
                    _mm256_storeu_si256((void *)(room.rows + i * wide + j), share);
                }
            }
            coupled(room.packed, v, stride, n, D);
            product(room.product, (const int32_t *)room.rows, wide / 2, 1, room.packed, n, D, (n + 1) / 2);
            put(y + (starts[e] * heads + h) * D, heads * D, room.product, n, D, scale);
        }
    }
}

/* A row of shares, and of the gradient of what dropout made of them: to the scores' gradient and the dropped shares. */
INLINE void softmax_backward(const bf16 *shares, const flag *keep, const float *of_dropped, __m256i *of_scores,
                             __m256i *dropped, long n, float scaling, float scale) {
    __m512 sum = all(0);
    for (long j = 0; j < n; j += 16) {
        __mmask16 m = kept(keep ? keep + j : 0, first(n - j));
        dropped[j / 16] = _mm256_maskz_loadu_epi16(m, shares + j);
        sum = _mm512_fmadd_ps(widened(dropped[j / 16]), _mm512_loadu_ps(of_dropped + j), sum);
    }
    __m512 along = all(scale * _mm512_reduce_add_ps(sum));
    for (long j = 0; j < n; j += 16) {
        __mmask16 there = first(n - j), m = kept(keep ? keep + j : 0, there);
        __m512 share = widened(_mm256_maskz_loadu_epi16(there, shares + j));
        __m512 of_share = _mm512_maskz_mul_ps(m, _mm512_loadu_ps(of_dropped + j), all(scale));
        of_scores[j / 16] = narrowed(_mm512_mul_ps(_mm512_mul_ps(share, _mm512_sub_ps(of_share, along)), all(scaling)));
    }
}

/* From the gradient of y that of qkv. */
void attention_backward(const bf16 *qkv, const bf16 *of_y, bf16 *of_qkv, const bf16 *shares, const flag *keep, EXAMPLES,
                        long heads, long D, float scaling, float scale) {
    const long stride = 3 * heads * D;
#pragma omp parallel num_threads(threads)
    {
        Room room = own_part(memory, part);
#pragma omp for schedule(dynamic)
        for (long job = 0; job < examples * heads; job++) {
            const long e = job / heads, h = job % heads, n = lengths[e], wide = rounded_up(n, 16), vectors = wide / 16;
            const long begin = starts[e] * stride + h * D;
            const bf16 *q = qkv + begin, *k = q + heads * D, *v = k + heads * D;
            const bf16 *g = of_y + (starts[e] * heads + h) * D;
            transposed(room.packed, wide, v, stride, n, D / 2);
            product(room.product, (const int32_t *)g, heads * D / 2, 1, room.packed, n, wide, D / 2);
            for (long i = 0; i < n; i += 2) { /* two rows, for they become pairs of a column */
                __m256i of_scores[2][vectors], dropped[2][vectors];
                for (int r = 0; r < 2; r++) {
                    const long unit = (h * n + i + r) * n;
                    if (i + r < n)
                        softmax_backward(shares + squares[e] * heads + unit, keep ? keep + flags[e] + unit : 0,
                                         room.product + (i + r) * wide, of_scores[r], dropped[r], n, scaling, scale);
                    else
                        memset(of_scores[r], 0, 2 * wide), memset(dropped[r], 0, 2 * wide);
                    memcpy(room.rows + (i + r) * wide, of_scores[r], 2 * wide);
                }
                for (long j = 0; j < vectors; j++) {
                    const long at = i / 2 * wide + 16 * j;
                    _mm512_storeu_si512(room.scores_by_column + at, pairs_of(of_scores[0][j], of_scores[1][j]));
                    _mm512_storeu_si512(room.shares_by_column + at, pairs_of(dropped[0][j], dropped[1][j]));
                }
            }
            coupled(room.packed, k, stride, n, D);
            product(room.product, (const int32_t *)room.rows, wide / 2, 1, room.packed, n, D, (n + 1) / 2);
            put(of_qkv + begin, stride, room.product, n, D, 1);
            coupled(room.packed, q, stride, n, D);
            product(room.product, room.scores_by_column, 1, wide, room.packed, n, D, (n + 1) / 2);
            put(of_qkv + begin + heads * D, stride, room.product, n, D, 1);
            coupled(room.packed, g, heads * D, n, D);
            product(room.product, room.shares_by_column, 1, wide, room.packed, n, D, (n + 1) / 2);
            put(of_qkv + begin + 2 * heads * D, stride, room.product, n, D, scale);
        }
    }
}
