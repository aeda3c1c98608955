/* Forward pass of routed experts: see routing.h. */
#include "routing.h"

static void gather_panels(const Work *w, const Block *b, const float *base, float *panels) {
    const i64 D = w->call->width;
    EACH_PANEL(b) {
        const float *rows[PW];
        row_pointers(w, b->first + p * PW, n, base, w->call->slots, rows);
        to_panel(rows, n, pw, D, panels + p * PW * D);
    }
}

typedef void hidden_fn(const Call *c, i64 n, i64 pw, const float *gate, const float *up, float *out);

INLINE void hidden_of(const enum activation kind, i64 count, const float *gate, const float *up, float *out) {
    for (i64 i = 0; i < count; i += VW) {
        vf a = activate(kind, LOADU(gate + i), 0);
        STOREU(out + i, up ? a * LOADU(up + i) : a);
    }
}

NOINLINE void hidden(const Call *c, i64 count, const float *gate, const float *up, float *out) {
    if (c->activation == SILU) hidden_of(SILU, count, gate, up, out);
    else if (c->activation == GELU) hidden_of(GELU, count, gate, up, out);
    else if (c->activation == GELU_TANH) hidden_of(GELU_TANH, count, gate, up, out);
    else hidden_of(RELU, count, gate, up, out);
}

/* Hidden units [f0, f0 + n) of one panel: act[n][pw]; their values before act go to `saved`. */
static void first_layer(const Call *c, i64 e, i64 f0, i64 n, const float *x, i64 pw, float *act, float *saved, Ahead *ahead, i64 lines) {
    const i64 D = c->width, F = c->hidden, H = inner(c);
    const float *w = c->w1 + (e * H + f0) * D, *b = c->b1 ? c->b1 + e * H + f0 : 0;
    const enum start start = b ? BIAS : ZERO;
    float gate[12 * PW] __attribute__((aligned(64))), up[12 * PW] __attribute__((aligned(64)));
    const i64 step = pw == PW ? TR : 12;
    for (i64 i = 0; i < n; i += step) {
        const i64 r = MIN(step, n - i);
        float *g = saved ? saved + (f0 + i) * pw : gate;
        float *u = !c->gated ? 0 : saved ? saved + (F + f0 + i) * pw : up;
        product(r, D, w + i * D, D, x, pw, g, start, b ? b + i : 0, ahead + 0, lines);
        if (u) product(r, D, w + (F + i) * D, D, x, pw, u, start, b ? b + F + i : 0, ahead + 1, lines);
        hidden(c, r * pw, g, u, act + i * pw);
    }
}

static i64 hidden_chunk(i64 F) {
    const i64 parts = (F + 383) / 384;
    return MIN(F, ((F + parts - 1) / parts + 11) / 12 * 12);
}

#define WEIGHT_ROWS 48 /* rows of a weight that stay in the cache while panels pass */

static i64 lines_of(const Ahead *a) { return a->rows * ((a->length + LINE - 1) / LINE); }

/* What is read after hidden units [.., f) of a chunk: more of them, or the first rows of w2. Lines. */
static i64 after_first(const Call *c, i64 e, i64 f0, i64 f, i64 fc, Ahead *ahead) {
    const i64 D = c->width, F = c->hidden;
    if (f < fc) {
        const float *w = c->w1 + (e * inner(c) + f0 + f) * D;
        const i64 rows = MIN(WEIGHT_ROWS / 2, fc - f);
        ahead[0] = (Ahead){w, D, D, rows, 0};
        ahead[1] = (Ahead){w + F * D, D, D, c->gated ? rows : 0, 0};
    } else {
        const float *w = c->w2 + e * D * F + f0;
        const i64 rows = MIN(WEIGHT_ROWS, D) / 2;
        ahead[0] = (Ahead){w, F, fc, rows, 0};
        ahead[1] = (Ahead){w + rows * F, F, fc, rows, 0};
    }
    return lines_of(ahead);
}

/* After rows [.., d) of w2: more of them, the next chunk, or the next block's expert. */
static i64 after_second(const Call *c, i64 e, i64 next, i64 f0, i64 fc, i64 d, Ahead *ahead) {
    const i64 D = c->width, F = c->hidden, H = inner(c);
    if (d < D) *ahead = (Ahead){c->w2 + (e * D + d) * F + f0, F, fc, MIN(WEIGHT_ROWS, D - d), 0};
    else if (f0 + fc < F) *ahead = (Ahead){c->w1 + (e * H + f0 + fc) * D, D, D, MIN(WEIGHT_ROWS / 2, F - f0 - fc), 0};
    else *ahead = (Ahead){c->w1 + next * H * D, D, D, next == e ? 0 : MIN(WEIGHT_ROWS / 2, F), 0};
    return lines_of(ahead);
}

static void forward_block(const Work *w, const Block *b, float *scratch) {
    const Call *c = w->call;
    const i64 D = c->width, F = c->hidden, e = b->expert, chunk = hidden_chunk(F), P = PANELS(b);
    const i64 next = b + 1 < w->blocks + w->num_blocks ? b[1].expert : e;
    float *x = scratch, *act = x + P * PW * D, *out = act + P * PW * chunk;
    const float *bias = c->b2 ? c->b2 + e * D : 0;
    gather_panels(w, b, c->x, x);
    for (i64 f0 = 0; f0 < F; f0 += chunk) {
        const i64 fc = MIN(chunk, F - f0);
        for (i64 f = 0; f < fc; f += WEIGHT_ROWS / 2) {
            const i64 m = MIN(WEIGHT_ROWS / 2, fc - f);
            Ahead ahead[2];
            const i64 lines = after_first(c, e, f0, f + m, fc, ahead) * TR / (m * P) + 1;
            EACH_PANEL(b) {
                float *saved = c->saved ? c->saved + b->saved + p * PW * inner(c) : 0;
                first_layer(c, e, f0 + f, m, x + p * PW * D, pw, act + p * PW * chunk + f * pw, saved, ahead, lines);
            }
        }
        const enum start start = f0 ? ADD : bias ? BIAS : ZERO;
        for (i64 d = 0; d < D; d += WEIGHT_ROWS) {
            const i64 m = MIN(WEIGHT_ROWS, D - d);
            Ahead ahead;
            const i64 lines = after_second(c, e, next, f0, fc, d + m, &ahead) * TR / (m * P) + 1;
            EACH_PANEL(b)
                product(m, fc, c->w2 + (e * D + d) * F + f0, F, act + p * PW * chunk, pw, out + p * PW * D + d * pw,
                        start, bias ? bias + d : 0, &ahead, lines);
        }
    }
    EACH_PANEL(b) {
        float *rows[PW], scale[PW];
        for (i64 i = 0; i < n; i++) {
            const i64 q = w->order[b->first + p * PW + i];
            rows[i] = w->parts + q * D;
            scale[i] = c->gates[q];
        }
        from_panel(out + p * PW * D, n, pw, D, scale, rows);
    }
}

/* ---- experts of few rows ----
 *
 * Their time is that of reading their weights once. Rows stay row-major, a product is a sum over k
 * in vectors, and the weights pass in the order in which they lie: as STREAMS streams, each through
 * its own share of a matrix, since a processor fetches ahead per stream and page. One stream, also
 * with prefetch instructions, reads two thirds of what four read.
 */

#define FEW MIN(12, PW) /* rows: one panel of `saved` */
#define STREAMS 4
#define TOGETHER 3 /* rows of x against one read of the weights: STREAMS * TOGETHER sums */

/* Halves are added until one number is left. */
INLINE float total_of(vf v) {
    float part[VW];
    memcpy(part, &v, sizeof part);
#pragma GCC unroll 4
    for (int half = VW / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

/* out[j * ld + i * apart] = (bias[i * apart] +) <w + i * apart * K, x[j]> for r rows of weights and
 * m rows of x. */
INLINE void dots_of(const int r, const int m, i64 K, const float *w, i64 apart, const float *const *x,
                    const float *bias, float *out, i64 ld) {
    vf acc[STREAMS][TOGETHER];
#pragma GCC unroll 4
    for (int i = 0; i < r; i++)
#pragma GCC unroll 3
        for (int j = 0; j < m; j++) acc[i][j] = SPLAT(0.0f);
    i64 k = 0;
    for (; k + LINE <= K; k += LINE) {
#pragma GCC unroll 4
        for (int part = 0; part < LINE; part += VW) {
            vf xs[TOGETHER];
#pragma GCC unroll 3
            for (int j = 0; j < m; j++) xs[j] = LOADU(x[j] + k + part);
#pragma GCC unroll 4
            for (int i = 0; i < r; i++) {
                const vf row = LOADU(w + i * apart * K + k + part);
#pragma GCC unroll 3
                for (int j = 0; j < m; j++) acc[i][j] += row * xs[j];
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < r; i++)
#pragma GCC unroll 3
        for (int j = 0; j < m; j++) {
            float total = total_of(acc[i][j]);
            for (i64 l = k; l < K; l++) total += w[i * apart * K + l] * x[j][l];
            out[j * ld + i * apart] = bias ? total + bias[i * apart] : total;
        }
}

typedef void dots_fn(i64 K, const float *w, i64 apart, const float *const *x, const float *bias, float *out,
                     i64 ld);
#define DOTS(r, m)                                                                          \
    NOINLINE void dots_##r##_##m(i64 K, const float *w, i64 apart, const float *const *x,   \
                                 const float *bias, float *out, i64 ld) {                   \
        dots_of(r, m, K, w, apart, x, bias, out, ld);                                       \
    }
DOTS(1, 1) DOTS(1, 2) DOTS(1, 3) DOTS(4, 1) DOTS(4, 2) DOTS(4, 3)
static dots_fn *const DOTS_ONE[] = {dots_1_1, dots_1_2, dots_1_3};
static dots_fn *const DOTS_STREAMS[] = {dots_4_1, dots_4_2, dots_4_3};

/* out[j * ld + i] of m rows x[j] and n rows of weights. */
static void few_products(i64 n, i64 K, const float *w, const float *const *x, i64 m, const float *bias,
                         float *out, i64 ld) {
    const i64 apart = n / STREAMS, turns = (m + TOGETHER - 1) / TOGETHER;
    for (i64 i = 0; i < n; i = i + 1 == apart ? STREAMS * apart : i + 1)
        for (i64 turn = turns, j = 0, rows; turn; turn--, j += rows) {
            rows = (m - j + turn - 1) / turn;
            (i < apart ? DOTS_STREAMS : DOTS_ONE)[rows - 1](K, w + i * K, apart, x + j, bias ? bias + i : 0,
                                                            out + j * ld + i, ld);
        }
}

static i64 few_floats(const Call *c) { return FEW * (inner(c) + c->hidden + c->width + VW) + VW; }

/* Where a block's rows are before act, after it, and after the second layer. */
typedef struct {
    float *h, *act, *out;
    i64 ld; /* of act */
} Few;

static Few few_of(const Call *c, float *memory) {
    const i64 ld = (c->hidden + VW - 1) / VW * VW;
    return (Few){memory, memory + FEW * inner(c) + VW, memory + FEW * (inner(c) + ld) + VW, ld};
}

/* Hidden units [f0, f1): all, or whole vectors. */
static void few_first(const Work *w, const Block *b, Few t, i64 f0, i64 f1) {
    const Call *c = w->call;
    const i64 D = c->width, F = c->hidden, H = inner(c), e = b->expert, m = b->rows;
    const i64 whole = f1 - f0 == F, n = whole ? H : f1 - f0;
    const float *rows[FEW];
    row_pointers(w, b->first, m, c->x, c->slots, rows);
    for (i64 f = f0; f < H; f += whole ? H : F)
        few_products(n, D, c->w1 + (e * H + f) * D, rows, m, c->b1 ? c->b1 + e * H + f : 0, t.h + f, H);
    for (i64 j = 0; j < m; j++) {
        const float *h = t.h + j * H + f0;
        hidden(c, f1 - f0, h, c->gated ? h + F : 0, t.act + j * t.ld + f0);
    }
    if (c->saved)
        for (i64 f = f0; f < H; f += F)
            for (i64 i = f; i < f + f1 - f0; i++)
                for (i64 j = 0, pw = m > VW ? PW : VW; j < pw; j++)
                    c->saved[b->saved + i * pw + j] = t.h[MIN(j, m - 1) * H + i];
}

/* Columns [d0, d1) of the answer. */
static void few_second(const Work *w, const Block *b, Few t, i64 d0, i64 d1) {
    const Call *c = w->call;
    const i64 D = c->width, F = c->hidden, e = b->expert, m = b->rows;
    const float *acts[FEW];
    for (i64 j = 0; j < m; j++) acts[j] = t.act + j * t.ld;
    few_products(d1 - d0, F, c->w2 + (e * D + d0) * F, acts, m, c->b2 ? c->b2 + e * D + d0 : 0, t.out + d0, D);
    for (i64 j = 0; j < m; j++) {
        const i64 q = w->order[b->first + j];
        for (i64 d = d0; d < d1; d++) w->parts[q * D + d] = c->gates[q] * t.out[j * D + d];
    }
}

static void forward_few(const Work *w, const Block *b, float *scratch) {
    const Few t = few_of(w->call, scratch);
    few_first(w, b, t, 0, w->call->hidden);
    few_second(w, b, t, 0, w->call->width);
}

/* ---- fewer such experts than threads: every thread reads a share of each one's weights ---- */

#define WORTH_SHARING (1 << 18) /* weights of an expert, from which on threads gain more than they cost */

static int shares_few(const Work *w) {
    const Call *c = w->call;
    const i64 weights = (inner(c) + c->hidden) * c->width;
    if (c->width % VW || c->hidden % VW || weights < WORTH_SHARING) return 0;
    return w->num_blocks && w->num_blocks < c->threads && w->blocks[0].rows <= FEW;
}

/* Where share i of n begins: at a whole vector, so that every number is summed as without shares. */
static i64 share(i64 n, i64 i, i64 of) { return n / VW * i / of * VW; }

static void shared_first(void *data) {
    Work *w = data;
    const Call *c = w->call;
    const i64 T = c->threads, F = c->hidden;
    for (i64 i; (i = next_of(w)) < w->num_blocks * T;)
        few_first(w, w->blocks + i / T, few_of(c, w->shared + i / T * few_floats(c)), share(F, i % T, T),
                  share(F, i % T + 1, T));
}

static void shared_second(void *data) {
    Work *w = data;
    const Call *c = w->call;
    const i64 T = c->threads, D = c->width;
    for (i64 i; (i = next_of(w)) < w->num_blocks * T;)
        few_second(w, w->blocks + i / T, few_of(c, w->shared + i / T * few_floats(c)), share(D, i % T, T),
                   share(D, i % T + 1, T));
}

static int forward_shared(Work *w) {
    const i64 items = w->num_blocks * w->call->threads;
    w->shared = take(w->num_blocks * few_floats(w->call));
    if (!w->shared) return 1;
    in_parallel(w, shared_first, items);
    in_parallel(w, shared_second, items);
    free(w->shared);
    return 0;
}

static i64 longest(const Work *w) { return w->num_blocks ? w->blocks[0].rows + PW : 0; }

static void forward_body(void *data) {
    Work *w = data;
    const Call *c = w->call;
    const i64 most = longest(w) * (2 * c->width + hidden_chunk(c->hidden));
    float *scratch = take(MAX(most, few_floats(c)));
    if (!scratch) {
        w->failed = 1;
        return;
    }
    for (i64 i; (i = next_of(w)) < w->num_blocks;) {
        const Block *b = w->blocks + i;
        const i64 rows = w->ends[b->expert + 1] - w->ends[b->expert];
        (rows <= FEW ? forward_few : forward_block)(w, b, scratch);
    }
    free(scratch);
}

static void sum_forward(void *data) {
    Work *w = data;
    const i64 R = w->call->rows;
    for (i64 i; (i = next_of(w)) * SUM_ROWS < R;) sum_rows(w, i * SUM_ROWS, MIN(R, (i + 1) * SUM_ROWS), w->call->y);
}

int coterie_experts_forward(const Call *c) {
    if (bad_sizes(c)) return BAD_SIZES;
    Work w = {.call = c, .parts = c->slots == 1 ? c->y : c->parts};
    int failed = sort_rows(&w) || make_blocks(&w, block_limit(&w, 256));
    if (!failed && shares_few(&w)) failed = forward_shared(&w);
    else if (!failed) in_parallel(&w, forward_body, w.num_blocks);
    if (!failed) {
        in_parallel(&w, sum_forward, (c->rows + SUM_ROWS - 1) / SUM_ROWS);
    }
    release(&w);
    return failed || w.failed;
}

/* Floats in one vector register: what the compiler chose. */
int coterie_experts_vector(void) { return VW; }
