/* Feed-forward experts on routed rows: y[r] = sum_s gate[r][s] * expert[id[r][s]](x[r]), and its
 * gradients. float32, row-major, weights [E][out][in].
 *
 *   gated:  down(act(gate(x)) * up(x)),  w1 [E][2F][D] with the gate rows first
 *   plain:  down(act(up(x))),            w1 [E][F][D]
 *
 * An id outside 0..E-1 is nobody: its gate gets gradient 0. Rows are sorted by expert, each expert's rows are
 * taken in blocks of whole panels, and threads take blocks (or experts) one at a time; every sum
 * has one order, so results do not depend on the number of threads.
 *
 * Legend: R rows of x, S slots (choices of a row), A = R * S at most, E experts, D width, F hidden.
 */
#ifndef COTERIE_ROUTING_H
#define COTERIE_ROUTING_H
#include <stdlib.h>

#include "activation.h"

typedef void parallel_fn(void (*body)(void *), void *data, unsigned threads, unsigned flags);

typedef struct {
    i64 rows, slots, experts, width, hidden, gated, activation, threads;
    parallel_fn *parallel; /* OpenMP's, of the library that torch has loaded */
    const float *x, *gates, *w1, *b1, *w2, *b2;
    const i64 *ids;
    float *y, *saved; /* saved: activations before act, for the backward; or null */
    float *parts; /* [R * S][D] for what is summed over slots; not looked at where S = 1 */
    const float *dy;
    float *dx, *dgates, *dw1, *db1, *dw2, *db2; /* null where not asked for */
} Call;

typedef struct {
    i64 expert, first, rows; /* rows [first, first + rows) of the sorted ones */
    i64 saved;               /* where its panels start in `saved` */
} Block;

typedef struct {
    const Call *call;
    i64 *ends;   /* [E + 1]: where experts start in `order` */
    i64 *saved;  /* [E]: where their panels start in `saved`, in floats */
    i64 *order;  /* [A]: row * S + slot, by expert, rows ascending */
    float *parts; /* [R * S][D]: an answer (a gradient of x) per choice; their sum itself if S = 1 */
    float *shared; /* what threads that share an expert make together, block by block */
    Block *blocks;
    i64 num_blocks, next, failed;
} Work;

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* What a call answers. */
enum { DONE = 0, NO_MEMORY = 1, BAD_SIZES = 2 };

#define MOST ((i64)1 << 46) /* floats of one array, far beyond any address space in use */

static int beyond(i64 a, i64 b, i64 c) {
    i64 ab, abc;
    return __builtin_mul_overflow(a, b, &ab) || __builtin_mul_overflow(ab, c, &abc) || abc > MOST;
}

/* Whether sizes are none that arrays can have: every division and product below relies on this. */
static int bad_sizes(const Call *c) {
    if (c->rows < 0 || c->slots < 0 || c->experts < 1 || c->width < 1 || c->hidden < 1) return 1;
    if (c->threads < 1 || c->threads > 1 << 16 || c->activation < SILU || c->activation > RELU) return 1;
    if (c->rows > MOST || c->slots > MOST || c->experts > MOST || c->hidden > MOST) return 1;
    return beyond(c->rows, c->slots, c->width) || beyond(c->rows, c->slots, 2 * c->hidden) ||
           beyond(c->experts, 2 * c->hidden, c->width) || beyond(c->experts, PW, 2 * c->hidden) ||
           beyond(c->rows, 1, c->width);
}

static void *take(i64 floats) {
    const size_t bytes = ((size_t)MAX(floats, 1) * sizeof(float) + 127) / 64 * 64;
    return aligned_alloc(64, bytes);
}

/* Rows of an expert as they are stored: the last panel is VW wide where that is enough. */
static i64 padded(i64 rows) {
    const i64 rest = rows % PW;
    return rows - rest + (rest == 0 ? 0 : rest <= VW ? VW : PW);
}

static i64 inner(const Call *c) { return c->gated ? 2 * c->hidden : c->hidden; }

static i64 next_of(Work *w) { return __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED); }

static void in_parallel(Work *w, void (*body)(void *), i64 items) {
    w->next = 0;
    const i64 threads = MIN(w->call->threads, items);
    if (threads > 1 && w->call->parallel) w->call->parallel(body, w, (unsigned)threads, 0);
    else body(w);
}

static int sort_rows(Work *w) {
    const Call *c = w->call;
    const i64 choices = c->rows * c->slots, E = c->experts;
    w->ends = calloc(2 * E + 2, sizeof(i64));
    w->order = malloc(MAX(choices, 1) * sizeof(i64));
    if (!w->ends || !w->order) return 1;
    w->saved = w->ends + E + 1;
    for (i64 q = 0; q < choices; q++)
        if (c->ids[q] >= 0 && c->ids[q] < E) w->ends[c->ids[q] + 1]++;
    i64 stored = 0;
    for (i64 e = 0; e < E; e++) {
        w->saved[e] = stored * inner(c);
        stored += padded(w->ends[e + 1]);
        w->ends[e + 1] += w->ends[e];
    }
    i64 *at = malloc((E + 1) * sizeof(i64));
    if (!at) return 1;
    memcpy(at, w->ends, (E + 1) * sizeof(i64));
    for (i64 q = 0; q < choices; q++)
        if (c->ids[q] >= 0 && c->ids[q] < E) w->order[at[c->ids[q]]++] = q;
    free(at);
    return 0;
}

static int by_rows(const void *a, const void *b) {
    const Block *p = a, *q = b;
    if (p->rows != q->rows) return p->rows < q->rows ? 1 : -1;
    return p->first < q->first ? -1 : 1;
}

/* Every expert's rows in equal blocks of at most `limit`, longest first. */
static int make_blocks(Work *w, i64 limit) {
    const Call *c = w->call;
    const i64 total = w->ends[c->experts];
    w->blocks = malloc((total / limit + c->experts + 1) * sizeof(Block));
    if (!w->blocks) return 1;
    w->num_blocks = 0;
    for (i64 e = 0; e < c->experts; e++) {
        const i64 rows = w->ends[e + 1] - w->ends[e];
        const i64 parts = (rows + limit - 1) / limit;
        i64 done = 0;
        for (i64 p = 0; p < parts; p++) {
            i64 size = (rows - done + parts - p - 1) / (parts - p);
            size = MIN((size + PW - 1) / PW * PW, rows - done);
            if (size <= 0) break;
            w->blocks[w->num_blocks++] = (Block){e, w->ends[e] + done, size, w->saved[e] + done * inner(c)};
            done += size;
        }
    }
    qsort(w->blocks, w->num_blocks, sizeof(Block), by_rows);
    return 0;
}

/* Rows per block: what the cache holds, and enough blocks for every thread. One expert's rows are
 * dealt out evenly: three blocks would keep two threads busy for two thirds of the time. */
static i64 block_limit(const Work *w, i64 most) {
    const i64 threads = w->call->threads, total = w->ends[w->call->experts];
    if (threads <= 1) return most;
    const i64 even = ((total + threads - 1) / threads + PW - 1) / PW * PW;
    if (w->call->experts == 1 && even <= most) return even;
    const i64 wanted = total / (16 * threads) / PW * PW;
    return MAX(4 * PW, MIN(most, wanted));
}

#define PANELS(block) (((block)->rows + PW - 1) / PW)
/* for each panel p of a block: its n rows, stored pw wide */
#define EACH_PANEL(block)                                                              \
    for (i64 p = 0, n, pw; p < PANELS(block) &&                                        \
                           (n = MIN((block)->rows - p * PW, PW), pw = n > VW ? PW : VW); \
         p++)

static void row_pointers(const Work *w, i64 first, i64 n, const float *base, i64 divide, const float **rows) {
    const i64 D = w->call->width;
    for (i64 i = 0; i < n; i++) rows[i] = base + w->order[first + i] / divide * D;
}

/* out[r] = sum over slots of parts[r][slot], left out where nobody was chosen. */
static void sum_rows(const Work *w, i64 first, i64 end, float *out) {
    const Call *c = w->call;
    const i64 D = c->width, S = c->slots;
    for (i64 r = first; r < end; r++) {
        float *to = out + r * D;
        const float *from[2];
        i64 waiting = 0, begun = 0;
        for (i64 s = 0; s <= S; s++) {
            const int chosen = s < S && c->ids[r * S + s] >= 0 && c->ids[r * S + s] < c->experts;
            if (chosen) from[waiting++] = w->parts + (r * S + s) * D;
            if (waiting < 2 && s < S) continue;
            if (waiting == 2 && !begun)
                for (i64 d = 0; d < D; d++) to[d] = from[0][d] + from[1][d];
            else if (waiting == 2)
                for (i64 d = 0; d < D; d++) to[d] = to[d] + from[0][d] + from[1][d];
            else if (waiting == 1 && begun)
                for (i64 d = 0; d < D; d++) to[d] += from[0][d];
            else if (waiting == 1 && from[0] != to) memcpy(to, from[0], D * sizeof(float));
            else if (!waiting && !begun) memset(to, 0, D * sizeof(float));
            begun = begun || waiting;
            waiting = 0;
        }
    }
}

#define SUM_ROWS 64 /* of one item */

static void release(Work *w) {
    free(w->ends);
    free(w->order);
    free(w->blocks);
}

#endif
