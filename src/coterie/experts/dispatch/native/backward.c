/* Gradients of routed experts: see routing.h.
 *
 * With u = W2^T dy:  dgate = <u, act>,  dact = gate u,  dx = W1^T dh,  dW1 = dh x^T,  dW2 = dy (gate act)^T.
 * The answers themselves are not needed, and `saved` holds all of the forward that is.
 */

#include "routing.h"

#define PART_ROWS 512 /* rows of an expert whose weight gradients are summed at once */
#define COLUMNS (3 * PW) /* of a weight, packed at once: whole tiles and whole strips */
#define DEPTH 768     /* rows of a weight packed at once where sums may be continued */

typedef struct {
    Block block;
    int continues;      /* not the first part of its expert: weight gradients are added to */
    float *dy, *dh;     /* panels of dy [D][row] and of dh [H][row], dh a line further apart */
    float *x, *act;     /* strips of x and of gate * act: [strip][row][PW] */
    float *gates;       /* of its rows, 0 where a panel has none */
} Part;

static i64 strips(i64 columns) { return (columns + PW - 1) / PW * PW; }
static i64 dh_stride(const Call *c) { return inner(c) * PW + LINE; }

static i64 part_floats(const Call *c, i64 rows) {
    const i64 panels = (rows + PW - 1) / PW, m = panels * PW;
    return m * (c->width + strips(c->width) + strips(c->hidden) + 1) + panels * dh_stride(c);
}

static void place(const Call *c, Part *part, float *memory) {
    const i64 panels = PANELS(&part->block), m = panels * PW;
    part->dy = memory;
    part->dh = part->dy + m * c->width;
    part->x = part->dh + panels * dh_stride(c);
    part->act = part->x + m * strips(c->width);
    part->gates = part->act + m * strips(c->hidden);
}

static i64 row_floats(const Call *c, i64 panels) {
    return 2 * COLUMNS * PW + COLUMNS * MAX(c->width, DEPTH) + panels * PW * (c->width + 1);
}

/* n hidden units of a panel. u: gradient of the answer behind down; out: gate * act. */
INLINE void slopes_of(const enum activation kind, const int gated, i64 n, i64 pw, const float *u,
                      const float *h, i64 other, const float *gates, float *dh, float *out, float *dgates) {
    for (i64 g = 0; g < pw; g += VW) {
        const vf gate = LOAD(gates + g);
        vf total = LOAD(dgates + g);
        for (i64 i = g; i < n * pw; i += pw) {
            vf slope, a = activate(kind, LOAD(h + i), &slope), du = LOAD(u + i);
            const vf up = gated ? LOAD(h + other + i) : SPLAT(1.0f);
            const vf act = a * up, dact = gate * du;
            total += du * act;
            STORE(out + i, gate * act);
            STORE(dh + i, dact * slope * up);
            if (gated) STORE(dh + other + i, dact * a);
        }
        STORE(dgates + g, total);
    }
}

NOINLINE void slopes(const Call *c, i64 n, i64 pw, const float *u, const float *h, const float *gates,
                     float *dh, float *out, float *dgates) {
    const i64 other = c->hidden * pw;
#define SLOPES(kind)                                                                       \
    if (c->gated) slopes_of(kind, 1, n, pw, u, h, other, gates, dh, out, dgates);          \
    else slopes_of(kind, 0, n, pw, u, h, other, gates, dh, out, dgates);
    if (c->activation == SILU) { SLOPES(SILU) }
    else if (c->activation == GELU) { SLOPES(GELU) }
    else if (c->activation == GELU_TANH) { SLOPES(GELU_TANH) }
    else { SLOPES(RELU) }
}

/* for panels p0 <= p < p1 of a part: n rows, stored pw wide */
#define EACH_OF(part, p0, p1)                                                                   \
    for (i64 p = p0, n, pw;                                                                     \
         p < p1 && (n = MIN((part)->block.rows - p * PW, PW), pw = n > VW ? PW : VW); p++)

/* What depends on rows: dh, the gradients of gates and of x; and the strips of x and act. */
static void row_gradients(const Work *w, const Part *part, i64 p0, i64 p1, float *scratch) {
    const Call *c = w->call;
    const Block *b = &part->block;
    const i64 D = c->width, F = c->hidden, H = inner(c), S = c->slots, e = b->expert, m = b->rows;
    const i64 stride = dh_stride(c);
    float *u = scratch, *act = u + COLUMNS * PW, *packed = act + COLUMNS * PW;
    float *dx = packed + COLUMNS * MAX(D, DEPTH), *dgates = dx + (p1 - p0) * PW * D;
    memset(dgates, 0, (p1 - p0) * PW * sizeof(float));
    EACH_OF(part, p0, p1) {
        const float *rows[PW];
        for (i64 i = 0; i < PW; i++)
            part->gates[p * PW + i] = i < n ? c->gates[w->order[b->first + p * PW + i]] : 0.0f;
        row_pointers(w, b->first + p * PW, n, c->dy, S, rows);
        to_panel(rows, n, pw, D, part->dy + p * PW * D);
        if (c->dw1) {
            row_pointers(w, b->first + p * PW, n, c->x, S, rows);
            to_strips(rows, n, m, D, part->x + p * PW * PW);
        }
    }
    for (i64 f = 0; f < F; f += COLUMNS) {
        const i64 columns = MIN(COLUMNS, F - f);
        pack_columns(c->w2 + e * D * F + f, F, D, columns, packed);
        EACH_OF(part, p0, p1) {
            packed_product(columns, D, packed, part->dy + p * PW * D, pw, u, ZERO);
            slopes(c, columns, pw, u, c->saved + b->saved + p * PW * H + f * pw, part->gates + p * PW,
                   part->dh + p * stride + f * pw, act, dgates + (p - p0) * PW);
            for (i64 j = 0; c->dw2 && j < columns; j += PW)
                panel_to_strip(act + j * pw, n, pw, MIN(PW, columns - j), part->act + (f + j) * m + p * PW * PW);
        }
    }
    EACH_OF(part, p0, p1)
        for (i64 i = 0; i < n; i++) {
            const i64 q = w->order[b->first + p * PW + i];
            float bias = 0.0f;
            for (i64 d = 0; c->b2 && d < D; d++) bias += c->dy[q / S * D + d] * c->b2[e * D + d];
            c->dgates[q] = dgates[(p - p0) * PW + i] + bias;
        }
    if (!c->dx) return;
    for (i64 d = 0; d < D; d += COLUMNS) {
        const i64 columns = MIN(COLUMNS, D - d);
        for (i64 k = 0; k < H; k += DEPTH) {
            const i64 depth = MIN(DEPTH, H - k);
            pack_columns(c->w1 + (e * H + k) * D + d, D, depth, columns, packed);
            EACH_OF(part, p0, p1)
                packed_product(columns, depth, packed, part->dh + p * stride + k * pw, pw,
                               dx + (p - p0) * PW * D + d * pw, k ? ADD : ZERO);
        }
    }
    EACH_OF(part, p0, p1) {
        float *rows[PW], ones[PW];
        for (i64 i = 0; i < n; i++) {
            rows[i] = w->parts + w->order[b->first + p * PW + i] * D;
            ones[i] = 1.0f;
        }
        from_panel(dx + (p - p0) * PW * D, n, pw, D, ones, rows);
    }
}

/* db[i] (+)= sum over rows of panels[.][i][row], times gate where given, for first <= i < last */
static void bias_gradients(const Part *part, i64 first, i64 last, const float *panels, i64 stride,
                           const float *gates, float *db) {
    for (i64 i = first; i < last; i++) {
        vf sum = SPLAT(0.0f);
        EACH_OF(part, 0, PANELS(&part->block))
            for (i64 g = 0; g < (n ? pw : 0); g += VW) {
                const vf value = LOAD(panels + p * stride + i * pw + g);
                sum += gates ? value * LOAD(gates + p * PW + g) : value;
            }
        float total = part->continues ? db[i] : 0.0f;
        for (int j = 0; j < VW; j++) total += sum[j];
        db[i] = total;
    }
}

/* Rows [first, last) of the gradients of both weights, counted through: dW1 and then dW2. */
static void weight_gradients(const Work *w, const Part *part, i64 first, i64 last) {
    const Call *c = w->call;
    const i64 D = c->width, F = c->hidden, H = inner(c), e = part->block.expert, m = part->block.rows;
    if (c->dw1 && first < H) {
        outer_products(first, MIN(last, H), D, m, part->dh, dh_stride(c), part->x, c->dw1 + e * H * D, part->continues);
        if (c->db1)
            bias_gradients(part, first, MIN(last, H), part->dh, dh_stride(c), 0, c->db1 + e * H);
    }
    if (c->dw2 && last > H) {
        first = MAX(0, first - H);
        outer_products(first, last - H, F, m, part->dy, PW * D, part->act, c->dw2 + e * D * F, part->continues);
        if (c->db2) bias_gradients(part, first, last - H, part->dy, PW * D, part->gates, c->db2 + e * D);
    }
}

static void no_gradients(const Call *c, i64 e) {
    const i64 D = c->width, F = c->hidden, H = inner(c);
    if (c->dw1) memset(c->dw1 + e * H * D, 0, H * D * sizeof(float));
    if (c->dw2) memset(c->dw2 + e * D * F, 0, D * F * sizeof(float));
    if (c->db1) memset(c->db1 + e * H, 0, H * sizeof(float));
    if (c->db2) memset(c->db2 + e * D, 0, D * sizeof(float));
}

typedef struct {
    Work work; /* first: the shared parts of this file take it */
    Part *parts;
    i64 num_parts;
    i64 *experts, num_experts;  /* with rows [0, ..): longest first */
    i64 *first_part;            /* [E + 1] */
    i64 *items, num_items;      /* of the phase at hand: part and panel, or expert and row */
    float *memory;              /* [held], of the experts that threads share */
    i64 held;
} Back;

static i64 rows_of(const Work *w, i64 e) { return w->ends[e + 1] - w->ends[e]; }

/* At least `floats` at *memory, of which *held are there; 0 where there is no room. */
static int reserve(float **memory, i64 *held, i64 floats) {
    if (floats > *held) {
        free(*memory);
        *memory = take(floats);
        *held = *memory ? floats : 0;
    }
    return *memory != 0;
}

/* One expert by one thread, its parts one after the other. */
static int whole_expert(Back *b, i64 e, float **memory, i64 *held) {
    Work *w = &b->work;
    const Call *c = w->call;
    if (!rows_of(w, e)) {
        no_gradients(c, e);
        return 0;
    }
    for (i64 i = b->first_part[e]; i < b->first_part[e + 1]; i++) {
        Part *part = b->parts + i;
        const i64 panels = PANELS(&part->block), own = part_floats(c, part->block.rows);
        if (!reserve(memory, held, own + row_floats(c, panels))) return 1;
        place(c, part, *memory);
        row_gradients(w, part, 0, panels, *memory + own);
        weight_gradients(w, part, 0, inner(c) + c->width);
    }
    return 0;
}

static void whole_body(void *data) {
    Back *b = data;
    float *memory = 0;
    i64 held = 0;
    for (i64 i; (i = next_of(&b->work)) < b->num_items;)
        if (whole_expert(b, b->items[i], &memory, &held)) b->work.failed = 1;
    free(memory);
}

#define ROW_PANELS 16 /* panels of one item: fewer would pack weights too often */
static void rows_body(void *data) {
    Back *b = data;
    float *scratch = take(row_floats(b->work.call, ROW_PANELS));
    if (!scratch) b->work.failed = 1;
    for (i64 i; scratch && (i = next_of(&b->work)) < b->num_items;) {
        const Part *part = b->parts + b->items[2 * i];
        const i64 p = b->items[2 * i + 1];
        row_gradients(&b->work, part, p, MIN(PANELS(&part->block), p + ROW_PANELS), scratch);
    }
    free(scratch);
}

#define WEIGHT_ITEM (32 * TR)
static void weights_body(void *data) {
    Back *b = data;
    const Call *c = b->work.call;
    for (i64 i; (i = next_of(&b->work)) < b->num_items;) {
        const i64 e = b->items[2 * i], row = b->items[2 * i + 1], H = inner(c);
        const i64 end = MIN(row < H ? H : H + c->width, row + WEIGHT_ITEM);
        for (i64 p = b->first_part[e]; p < b->first_part[e + 1]; p++)
            weight_gradients(&b->work, b->parts + p, row, end);
    }
}

/* Memory of experts that threads share at a time: what one phase leaves is read by the next, from a
 * cache if it is not too much; and fresh memory costs its first touch, so one piece serves all. */
#define GROUP_FLOATS (8 << 20)

/* Experts [first, ..) of the list that fit into one piece of memory, by all threads together. */
static i64 shared_experts(Back *b, i64 first, i64 last) {
    const Call *c = b->work.call;
    const i64 rows_all = inner(c) + c->width;
    i64 floats = 0, end = first, items = 0;
    for (; end < last; end++) {
        const i64 e = b->experts[end];
        i64 own = 0;
        for (i64 p = b->first_part[e]; p < b->first_part[e + 1]; p++) own += part_floats(c, b->parts[p].block.rows);
        if (end > first && floats + own > GROUP_FLOATS) break;
        floats += own;
    }
    if (!reserve(&b->memory, &b->held, floats)) {
        b->work.failed = 1;
        return last;
    }
    float *at = b->memory;
    for (i64 i = first; i < end; i++)
        for (i64 p = b->first_part[b->experts[i]]; p < b->first_part[b->experts[i] + 1]; p++) {
            Part *part = b->parts + p;
            place(c, part, at);
            at += part_floats(c, part->block.rows);
            for (i64 panel = 0; panel < PANELS(&part->block); panel += ROW_PANELS, items++) {
                b->items[2 * items] = p;
                b->items[2 * items + 1] = panel;
            }
        }
    b->num_items = items;
    in_parallel(&b->work, rows_body, items);
    items = 0;
    for (i64 i = first; i < end; i++)
        for (i64 row = 0; row < rows_all; items++) {
            b->items[2 * items] = b->experts[i];
            b->items[2 * items + 1] = row;
            row = row < inner(c) ? MIN(inner(c), row + WEIGHT_ITEM) : row + WEIGHT_ITEM;
        }
    b->num_items = items;
    in_parallel(&b->work, weights_body, items);
    return end;
}

static int make_parts(Back *b) {
    Work *w = &b->work;
    const Call *c = w->call;
    const i64 E = c->experts, total = w->ends[E], most = total / PART_ROWS + E + 1;
    const i64 panels = total / (ROW_PANELS * PW) + most, rows = (inner(c) + c->width) / WEIGHT_ITEM + 2;
    b->parts = malloc(most * sizeof(Part));
    b->first_part = malloc((E + 1) * sizeof(i64));
    b->items = malloc((2 * MAX(panels, E * rows) + E) * sizeof(i64));
    if (!b->parts || !b->first_part || !b->items) return 1;
    b->experts = b->items + 2 * MAX(panels, E * rows);
    for (i64 e = 0; e < E; e++) {
        b->experts[e] = e;
        b->first_part[e] = b->num_parts;
        const i64 count = rows_of(w, e);
        for (i64 done = 0; done < count; done += PART_ROWS)
            b->parts[b->num_parts++] = (Part){
                .block = {e, w->ends[e] + done, MIN(PART_ROWS, count - done), w->saved[e] + done * inner(c)},
                .continues = done > 0};
    }
    b->first_part[E] = b->num_parts;
    for (i64 i = 1; i < E; i++) { /* longest first; insertion, since loads are close to sorted or few */
        const i64 e = b->experts[i];
        i64 j = i;
        for (; j > 0 && rows_of(w, b->experts[j - 1]) < rows_of(w, e); j--) b->experts[j] = b->experts[j - 1];
        b->experts[j] = e;
    }
    return 0;
}

static void sum_backward(void *data) {
    Work *w = data;
    const i64 R = w->call->rows;
    for (i64 i; (i = next_of(w)) * SUM_ROWS < R;) sum_rows(w, i * SUM_ROWS, MIN(R, (i + 1) * SUM_ROWS), w->call->dx);
}

static void run(Back *b) {
    Work *w = &b->work;
    const Call *c = w->call;
    const i64 E = c->experts, total = w->ends[E];
    i64 shared = 0; /* experts too long for one thread to take alone */
    while (c->threads > 1 && shared < E && rows_of(w, b->experts[shared]) * 16 * c->threads > total) shared++;
    for (i64 first = 0; first < shared;) first = shared_experts(b, first, shared);
    memcpy(b->items, b->experts + shared, (E - shared) * sizeof(i64));
    b->num_items = E - shared;
    in_parallel(w, whole_body, b->num_items);
    if (c->dx) in_parallel(w, sum_backward, (c->rows + SUM_ROWS - 1) / SUM_ROWS);
}

int coterie_experts_backward(const Call *c) {
    if (bad_sizes(c)) return BAD_SIZES;
    Back b = {.work = {.call = c, .parts = c->slots == 1 ? c->dx : c->parts}};
    if (c->rows * c->slots) memset(c->dgates, 0, c->rows * c->slots * sizeof(float));
    const int failed = sort_rows(&b.work) || make_parts(&b);
    if (!failed) run(&b);
    free(b.memory);
    free(b.parts);
    free(b.first_part);
    free(b.items);
    release(&b.work);
    return failed || b.work.failed;
}
