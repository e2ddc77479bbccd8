/* sigmoid(r) * y and its gradients; included once per instruction set. */

INLINE vf sigmoid(vf x) { return 1 / (1 + exponential(-x)); }

INLINE void gate_vector(int64_t i, int64_t count, int dtype, const gate_call *call) {
    vf open = sigmoid(load_some(call->r, i, count, dtype));
    store_some(call->out, i, count, open * load_some(call->y, i, count, dtype), dtype);
}

INLINE void gate_range(int dtype, const gate_call *call, int64_t begin, int64_t end) {
    FOR_VECTORS(begin, end, gate_vector, dtype, call);
}

static void gate(const gate_call *call, int64_t begin, int64_t end) {
    FOR_DTYPE(call->dtype, gate_range, call, begin, end);
}

INLINE void gate_vector_grads(int64_t i, int64_t count, int dtype, const gate_call *call) {
    vf open = sigmoid(load_some(call->r, i, count, dtype));
    vf gy = open * load_some(call->grad, i, count, dtype);
    vf gr = gy * load_some(call->y, i, count, dtype) * (1 - open);
    store_some(call->gy, i, count, gy, dtype);
    store_some(call->gr, i, count, gr, dtype);
}

INLINE void gate_range_grads(int dtype, const gate_call *call, int64_t begin, int64_t end) {
    FOR_VECTORS(begin, end, gate_vector_grads, dtype, call);
}

static void gate_grads(const gate_call *call, int64_t begin, int64_t end) {
    FOR_DTYPE(call->dtype, gate_range_grads, call, begin, end);
}
