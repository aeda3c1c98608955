/* Register tiles of a matrix product, and moves between rows and panels.
 *
 * A panel holds PW rows (the last one of a segment VW, where that is enough) side by side:
 * panel[k][row], so that one vector register holds one feature of VW rows. A weight is broadcast
 * against it, straight from its row-major matrix [out][in]: weights are never copied in a forward
 * pass, and what one product writes, [out][row], is the panel that the next one reads.
 *
 * Written with the compiler's vector extensions: VW follows the instruction set it compiles for.
 */
#ifndef COTERIE_TILE_H
#define COTERIE_TILE_H
#include <stdint.h>
#include <string.h>

#ifdef COTERIE_VW /* for tests of other widths */
#define VW COTERIE_VW
#elif defined(__AVX512F__)
#define VW 16
#elif defined(__AVX__)
#define VW 8
#else
#define VW 4
#endif
#define PW (2 * VW)
#if defined(__AVX512F__) || defined(__aarch64__)
#define TR 12 /* 32 registers: 24 sums */
#else
#define TR 6 /* 16 registers: 12 sums, 2 of the panel, 1 weight */
#endif
#define LINE 16 /* floats in a line of the cache */

typedef float vf __attribute__((vector_size(4 * VW)));
typedef int32_t vi __attribute__((vector_size(4 * VW)));
typedef float vfu __attribute__((vector_size(4 * VW), aligned(4)));
typedef int64_t i64;

#define INLINE static inline __attribute__((always_inline))
#define LOAD(p) (*(const vf *)(p))
#define LOADU(p) ((vf)(*(const vfu *)(p)))
#define STORE(p, v) (*(vf *)(p) = (v))
#define STOREU(p, v) (*(vfu *)(p) = (vfu)(v))
#define SPLAT(a) ((a) - (vf){0}) /* a - 0 is a, also for -0: compilers drop the subtraction */

enum start { ZERO, ADD, BIAS };

/* c[r][nv * VW] = (0, c or bias[r]) + sum_k w[i * rs + k * cs] x[k][nv * VW] */
INLINE void tile_of(const int r, const int nv, i64 K, const float *w, const i64 rs, const i64 cs,
                    const float *x, float *c, const enum start start, const float *bias) {
    vf acc[2 * TR][2];
    const int pw = nv * VW;
#pragma GCC unroll 24
    for (int i = 0; i < r; i++)
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++)
            acc[i][v] = start == ADD ? LOAD(c + i * pw + v * VW) : start == BIAS ? SPLAT(bias[i]) : SPLAT(0.0f);
#pragma GCC unroll 4
    for (i64 k = 0; k < K; k++) {
        vf xs[2];
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++) xs[v] = LOAD(x + k * pw + v * VW);
#pragma GCC unroll 24
        for (int i = 0; i < r; i++) {
            vf b = SPLAT(w[i * rs + k * cs]);
#pragma GCC unroll 2
            for (int v = 0; v < nv; v++) acc[i][v] += b * xs[v];
        }
    }
#pragma GCC unroll 24
    for (int i = 0; i < r; i++)
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++) STORE(c + i * pw + v * VW, acc[i][v]);
}

#define NOINLINE static __attribute__((noinline))
typedef void tile_fn(i64 K, const float *w, i64 rs, const float *x, float *c, enum start, const float *bias);

#define STARTS(r, nv, rs, cs)                                                     \
    if (start == ZERO) tile_of(r, nv, K, w, rs, cs, x, c, ZERO, bias);            \
    else if (start == ADD) tile_of(r, nv, K, w, rs, cs, x, c, ADD, bias);         \
    else tile_of(r, nv, K, w, rs, cs, x, c, BIAS, bias);
#define DIRECT(r, nv)                                                                        \
    NOINLINE void direct_##r##_##nv(i64 K, const float *w, i64 rs, const float *x, float *c, \
                                    enum start start, const float *bias) {                   \
        STARTS(r, nv, rs, 1)                                                                 \
    }
#define EACH_HALF(D, nv) D(1, nv) D(2, nv) D(3, nv) D(4, nv) D(5, nv) D(6, nv)
#define EACH_FULL(D, nv) EACH_HALF(D, nv) D(7, nv) D(8, nv) D(9, nv) D(10, nv) D(11, nv) D(12, nv)
#define NAMES_HALF(f, nv) f##_1_##nv, f##_2_##nv, f##_3_##nv, f##_4_##nv, f##_5_##nv, f##_6_##nv
#define NAMES_FULL(f, nv) \
    NAMES_HALF(f, nv), f##_7_##nv, f##_8_##nv, f##_9_##nv, f##_10_##nv, f##_11_##nv, f##_12_##nv
EACH_FULL(DIRECT, 1)
#if TR == 6
EACH_HALF(DIRECT, 2)
static tile_fn *const DIRECT_WIDE[] = {NAMES_HALF(direct, 2)};
#else
EACH_FULL(DIRECT, 2)
static tile_fn *const DIRECT_WIDE[] = {NAMES_FULL(direct, 2)};
#endif
static tile_fn *const DIRECT_SLIM[] = {NAMES_FULL(direct, 1)};

/* Weights packed as [k][TR]: c[TR][pw]. */
NOINLINE void packed_2(i64 K, const float *w, const float *x, float *c, enum start start) {
    const float *bias = 0;
    STARTS(TR, 2, 1, TR)
}
NOINLINE void packed_1(i64 K, const float *w, const float *x, float *c, enum start start) {
    const float *bias = 0;
    STARTS(TR, 1, 1, TR)
}

/* Weights to be used next, fetched into the cache a few lines at a time between products. */
typedef struct {
    const float *w;       /* rows [0, rows) of `length` floats, `stride` apart */
    i64 stride, length, rows, at;
} Ahead;

INLINE void fetch(Ahead *a, i64 lines) {
    for (; lines > 0 && a->rows > 0; lines--) {
        __builtin_prefetch(a->w + a->at, 0, 3);
        a->at += LINE;
        if (a->at >= a->length) {
            a->at = 0;
            a->w += a->stride;
            a->rows--;
        }
    }
}

/* c[i][0..pw) of n weight rows from w, row stride rs, against one panel of width pw; `lines` of what
 * comes next are fetched with every tile. */
INLINE void product(i64 n, i64 K, const float *w, i64 rs, const float *x, i64 pw, float *c,
                    enum start start, const float *bias, Ahead *ahead, i64 lines) {
    const i64 step = pw == PW ? TR : 12;
    for (i64 i = 0; i < n; i += step) {
        const i64 r = n - i < step ? n - i : step;
        fetch(ahead, lines * r / TR);
        (pw == PW ? DIRECT_WIDE : DIRECT_SLIM)[r - 1](K, w + i * rs, rs, x, c + i * pw, start,
                                                      bias ? bias + i : 0);
    }
}

/* Columns [0, n) of the matrix w[k][ld] as tiles [n / TR][k][TR], the last one filled with 0. */
static void pack_columns(const float *w, i64 ld, i64 K, i64 n, float *packed) {
    const i64 whole = n / TR;
    for (i64 k = 0; k < K; k++) {
        const float *row = w + k * ld;
        for (i64 t = 0; t < whole; t++)
            memcpy(packed + (t * K + k) * TR, row + t * TR, TR * sizeof(float));
    }
    if (n % TR)
        for (i64 k = 0; k < K; k++)
            for (i64 i = 0; i < TR; i++)
                packed[(whole * K + k) * TR + i] = whole * TR + i < n ? w[k * ld + whole * TR + i] : 0.0f;
}

/* c[n][pw] (+)= tiles times one panel. */
static void packed_product(i64 n, i64 K, const float *packed, const float *x, i64 pw, float *c,
                           enum start start) {
    for (i64 i = 0; i < n; i += TR, packed += K * TR) {
        const i64 r = n - i < TR ? n - i : TR;
        float last[TR * PW] __attribute__((aligned(64)));
        float *to = r == TR ? c + i * pw : last;
        if (r < TR) {
            memset(last, 0, sizeof last);
            if (start == ADD) memcpy(last, c + i * pw, r * pw * sizeof(float));
        }
        if (pw == PW) packed_2(K, packed, x, to, start);
        else packed_1(K, packed, x, to, start);
        if (r < TR) memcpy(c + i * pw, last, r * pw * sizeof(float));
    }
}

/* Sums over rows: c[r][PW] (+)= sum over panels and rows of a[panel][first + i][row] x[row][PW]. */
INLINE void outer_of(const int r, i64 m, const float *a, i64 first, i64 stride, const float *x,
                     float *c, i64 ld, const int add) {
    vf acc[TR][2];
#pragma GCC unroll 12
    for (int i = 0; i < r; i++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) acc[i][v] = add ? LOADU(c + i * ld + v * VW) : SPLAT(0.0f);
    for (i64 row = 0; row < m; row += PW, a += stride) {
        const i64 n = m - row < PW ? m - row : PW;
        if (n == PW) {
#pragma GCC unroll 4
            for (i64 k = 0; k < PW; k++) {
                const float *q = a + first * PW + k;
                vf x0 = LOAD(x + (row + k) * PW), x1 = LOAD(x + (row + k) * PW + VW);
#pragma GCC unroll 12
                for (int i = 0; i < r; i++) {
                    vf b = SPLAT(q[i * PW]);
                    acc[i][0] += b * x0;
                    acc[i][1] += b * x1;
                }
            }
        } else {
            const i64 pw = n > VW ? PW : VW;
            for (i64 k = 0; k < n; k++) {
                const float *q = a + first * pw + k;
                vf x0 = LOAD(x + (row + k) * PW), x1 = LOAD(x + (row + k) * PW + VW);
#pragma GCC unroll 12
                for (int i = 0; i < r; i++) {
                    vf b = SPLAT(q[i * pw]);
                    acc[i][0] += b * x0;
                    acc[i][1] += b * x1;
                }
            }
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < r; i++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) STOREU(c + i * ld + v * VW, acc[i][v]);
}

typedef void outer_fn(i64 m, const float *a, i64 first, i64 stride, const float *x, float *c, i64 ld,
                      int add);
#define OUTER(r, nv)                                                                              \
    NOINLINE void outer_##r##_##nv(i64 m, const float *a, i64 first, i64 stride, const float *x, \
                                   float *c, i64 ld, int add) {                                  \
        if (add) outer_of(r, m, a, first, stride, x, c, ld, 1);                                  \
        else outer_of(r, m, a, first, stride, x, c, ld, 0);                                      \
    }
#if TR == 6
EACH_HALF(OUTER, 2)
static outer_fn *const OUTERS[] = {NAMES_HALF(outer, 2)};
#else
EACH_FULL(OUTER, 2)
static outer_fn *const OUTERS[] = {NAMES_FULL(outer, 2)};
#endif

/* ---- rows and panels ---- */

/* VW x VW values, the rows at from + i * ld or at rows[i], into columns. */
#if defined(__has_builtin) && VW == 8
#if __has_builtin(__builtin_shufflevector)
#define FAST_TRANSPOSE
#endif
#endif
INLINE void transpose(vf *t) {
#ifdef FAST_TRANSPOSE
    vf a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        a[2 * i] = __builtin_shufflevector(t[2 * i], t[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        a[2 * i + 1] = __builtin_shufflevector(t[2 * i], t[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        b[4 * i] = __builtin_shufflevector(a[4 * i], a[4 * i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        b[4 * i + 1] = __builtin_shufflevector(a[4 * i], a[4 * i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        b[4 * i + 2] = __builtin_shufflevector(a[4 * i + 1], a[4 * i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        b[4 * i + 3] = __builtin_shufflevector(a[4 * i + 1], a[4 * i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        t[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
#else
    vf s[VW];
    for (int i = 0; i < VW; i++)
        for (int j = 0; j < VW; j++) s[i][j] = t[j][i];
    memcpy(t, s, sizeof s);
#endif
}

/* panel[k][row] from rows of length K; lanes past n repeat the last row (nothing mixes lanes). */
static void to_panel(const float *const *rows, i64 n, i64 pw, i64 K, float *panel) {
    const float *from[PW];
    for (i64 i = 0; i < pw; i++) from[i] = rows[i < n ? i : n - 1];
    for (i64 k = 0; k + VW <= K; k += VW)
        for (i64 g = 0; g < pw; g += VW) {
            vf t[VW];
#pragma GCC unroll 16
            for (int i = 0; i < VW; i++) t[i] = LOADU(from[g + i] + k);
            transpose(t);
#pragma GCC unroll 16
            for (int i = 0; i < VW; i++) STORE(panel + (k + i) * pw + g, t[i]);
        }
    for (i64 k = K - K % VW; k < K; k++)
        for (i64 i = 0; i < pw; i++) panel[k * pw + i] = from[i][k];
}

/* Rows [0, n) of panel[K][pw], times scale[row], to rows of length K. */
static void from_panel(const float *panel, i64 n, i64 pw, i64 K, const float *scale, float *const *rows) {
    for (i64 k = 0; k + VW <= K; k += VW)
        for (i64 g = 0; g < n; g += VW) {
            vf t[VW], s = LOADU(scale + g);
#pragma GCC unroll 16
            for (int i = 0; i < VW; i++) t[i] = LOAD(panel + (k + i) * pw + g) * s;
            transpose(t);
            if (n - g >= VW) {
#pragma GCC unroll 16
                for (int i = 0; i < VW; i++) STOREU(rows[g + i] + k, t[i]);
            } else
                for (i64 i = 0; g + i < n; i++) STOREU(rows[g + i] + k, t[i]);
        }
    for (i64 k = K - K % VW; k < K; k++)
        for (i64 i = 0; i < n; i++) rows[i][k] = panel[k * pw + i] * scale[i];
}

/* n rows of strips[ceil(K / PW)][m][PW] from row-major rows, filled with 0: columns for sums over
 * rows. */
static void to_strips(const float *const *rows, i64 n, i64 m, i64 K, float *strips) {
    for (i64 k = 0; k < K; k += PW, strips += m * PW)
        for (i64 i = 0; i < n; i++) {
            if (K - k >= PW) {
                STORE(strips + i * PW, LOADU(rows[i] + k));
                STORE(strips + i * PW + VW, LOADU(rows[i] + k + VW));
            } else
                for (i64 j = 0; j < PW; j++) strips[i * PW + j] = k + j < K ? rows[i][k + j] : 0.0f;
        }
}

/* strip[row][PW] of panel[PW columns][pw], rows [0, n), columns past `columns` 0. */
static void panel_to_strip(const float *panel, i64 n, i64 pw, i64 columns, float *strip) {
    if (columns == PW && n % VW == 0) {
        for (i64 g = 0; g < n; g += VW)
            for (i64 h = 0; h < PW; h += VW) {
                vf t[VW];
#pragma GCC unroll 16
                for (int i = 0; i < VW; i++) t[i] = LOAD(panel + (h + i) * pw + g);
                transpose(t);
#pragma GCC unroll 16
                for (int i = 0; i < VW; i++) STORE(strip + (g + i) * PW + h, t[i]);
            }
    } else
        for (i64 i = 0; i < n; i++)
            for (i64 j = 0; j < PW; j++) strip[i * PW + j] = j < columns ? panel[j * pw + i] : 0.0f;
}

/* Rows [first, last) of c[.][M] (+)= sums over m rows of panels a[panel][.][row], `stride` apart, and
 * strips x[ceil(M / PW)][m][PW]. */
static void outer_products(i64 first, i64 last, i64 M, i64 m, const float *a, i64 stride, const float *x,
                           float *c, int add) {
    const i64 block = 16 * TR; /* rows of c whose panels stay in the cache */
    for (; first < last; first += block) {
        const i64 end = first + block < last ? first + block : last;
        for (i64 j = 0; j < M; j += PW) {
            const float *strip = x + j * m;
            for (i64 i = first; i < end; i += TR) {
                const i64 r = end - i < TR ? end - i : TR;
                float *to = c + i * M + j;
                if (M - j >= PW) {
                    OUTERS[r - 1](m, a, i, stride, strip, to, M, add);
                } else {
                    float edge[TR * PW] __attribute__((aligned(64)));
                    OUTERS[r - 1](m, a, i, stride, strip, edge, PW, 0);
                    for (i64 q = 0; q < r; q++)
                        for (i64 s = 0; s < M - j; s++)
                            to[q * M + s] = add ? to[q * M + s] + edge[q * PW + s] : edge[q * PW + s];
                }
            }
        }
    }
}
#endif
