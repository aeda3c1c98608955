/* Activations of the hidden units and their derivatives, VW values at a time, float32. */
#ifndef COTERIE_ACTIVATION_H
#define COTERIE_ACTIVATION_H
#include "tile.h"

enum activation { SILU, GELU, GELU_TANH, RELU }; /* as op.py numbers them */

INLINE vf pick(vi where, vf yes, vf no) {
    return (vf)((where & (vi)yes) | (~where & (vi)no));
}

/* e^x to 2 ulp (Cephes: range reduction by ln 2 in two parts, polynomial of degree 6); x is
 * clamped to where the result is a normal number. NaN stays NaN. */
INLINE vf exp_of(vf x) {
    vf y = pick(x > 88.0f, SPLAT(88.0f), x);
    y = pick(y < -87.0f, SPLAT(-87.0f), y);
    vf shifted = y * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: round to nearest */
    vi n = (vi)shifted - (int32_t)0x4B400000;
    vf whole = shifted - 12582912.0f;
    vf f = y - whole * 0.693359375f;
    f = f + whole * 2.12194440e-4f;
    vf p = SPLAT(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    return p * (vf)((n + 127) << 23);
}

/* erf to 1.5e-7 absolute (Abramowitz and Stegun, 7.1.26); `square` = e^(-x^2) */
INLINE vf erf_of(vf x, vf square) {
    vi sign = (vi)x & (int32_t)0x80000000;
    vf z = (vf)((vi)x & 0x7FFFFFFF);
    vf t = 1.0f / (z * 0.3275911f + 1.0f);
    vf p = SPLAT(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vf value = 1.0f - p * t * square;
    return (vf)((vi)value | sign);
}

/* act(x); *slope = act'(x) where asked. */
INLINE vf activate(const enum activation kind, vf x, vf *slope) {
    if (kind == SILU) {
        vf s = 1.0f / (exp_of(-x) + 1.0f);
        if (slope) *slope = s * (x * (1.0f - s) + 1.0f);
        return x * s;
    }
    if (kind == GELU) {
        vf square = exp_of(x * x * -0.5f);
        vf phi = erf_of(x * 0.70710678118654752f, square) * 0.5f + 0.5f;
        if (slope) *slope = phi + x * square * 0.39894228040143268f;
        return x * phi;
    }
    if (kind == RELU) {
        if (slope) *slope = pick(x > 0.0f, SPLAT(1.0f), SPLAT(0.0f));
        return pick(x <= 0.0f, SPLAT(0.0f), x); /* NaN stays NaN */
    }
    vf cube = x * x * 0.044715f;
    vf u = x * (cube + 1.0f) * 0.79788456080286536f;
    vf t = 1.0f - 2.0f / (exp_of(u + u) + 1.0f);
    if (slope) *slope = (t + 1.0f) * 0.5f + x * 0.5f * (1.0f - t * t) * (cube * 3.0f + 1.0f) * 0.79788456080286536f;
    return x * 0.5f * (t + 1.0f);
}
#endif
