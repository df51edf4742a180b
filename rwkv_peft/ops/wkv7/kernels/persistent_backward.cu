// WKV-7's backward pass as a persistent kernel: a block goes back through all chunks of a head, as
// persistent_forward.cu goes forward. Between two chunks the gradient of the state lies where that of
// the initial state will be.
#include "gradients.cuh"

static_assert(IO == 0 && C == 64, "a warp has one slab of the state; other builds are not faster");

struct PersistentMemory : GradientMemory {
    enum : u32 {
        LEAVING = GradientMemory::LEAVING,  // float[2][GROUP_WARPS][N], for this chunk and the one before
        BYTES = LEAVING + 2 * GROUP_WARPS * N * 4,
        // in tiles that are written only after the decays of a chunk are known
        W_AHEAD = U, INVERSE_AHEAD = Z, STATE_AHEAD = DSTATE,
    };
};
typedef PersistentMemory Persistent;

struct PersistentBackward {
    Inputs in;
    const int* segments;
    const Op *inverse, *states;
    const float *last_state, *dlast_state;
    const Io* dy;
    Outputs out;
    float* dstate;
    int T, H, M;
};

// A thread reads later only what it has fetched itself.
DEVICE void fetch(const PersistentBackward& p, int chunk) {
    Position at = position(p.T, p.H, p.M, chunk);
    fetch_tokens(Persistent::W_AHEAD, p.in.w, at);
    fetch_tokens(At::A, p.in.a, at);
    fetch_tokens(At::B, p.in.b, at);
    fetch_tokens(At::K, p.in.k, at);
    fetch_tokens(At::R, p.in.r, at);
    fetch_tokens(At::V, p.in.v, at);
    fetch_tokens(At::DY, p.dy, at);
    int warp = warp_index();
#pragma unroll
    for (int i = 0; i < INVERSE_PIECES; i++) {
        int index = i * WARPS + warp;
        const Op* from = p.inverse + at.matrix * C * C;
        fetch_piece(Persistent::INVERSE_AHEAD, index, piece(from, index / (C / 16), index % (C / 16), C / 16));
    }
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int index = i * WARPS + warp;
        const Op* from = p.states + at.matrix * N * N;
        fetch_piece(Persistent::STATE_AHEAD, index, piece(from, index / 4, index % 4));
    }
    commit_copies();
}

DEVICE void load_dstate(States& s, const PersistentBackward& p) {
    const float* dstate = p.dstate + (u64)block_y() * N * N;
    int warp = warp_index(), g = thread_index() % 32 / 4, q = thread_index() % 4;
#pragma unroll
    for (int i = 0; i < PIECES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = (i * WARPS + warp) / 4 * 16 + g + j / 2 * 8, column = warp % 4 * 16 + j % 2 * 8 + 2 * q;
            s.dstate[i][j] = *(const FloatPair*)(dstate + row * N + column);
        }
}

DEVICE void put_fetched(const PersistentBackward& p, const Position& at, Shared& shared) {
    States states;
    Inverse inverse;
    load_dstate(states, p);
    write_documents(p.segments, p.T, p.H, at.chunk, shared.documents);
    wait_copies<0>();
    int warp = warp_index();
#pragma unroll
    for (int i = 0; i < INVERSE_PIECES; i++)
        inverse.f[i] = read_fetched_piece(Persistent::INVERSE_AHEAD, i * WARPS + warp);
    put_inverse(At::INVERSE, inverse);
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        states.state[i] = read_fetched_piece(Persistent::STATE_AHEAD, i * WARPS + warp);
    Factors factor = decay_factors(read_fetched_tokens(Persistent::W_AHEAD), at, shared);
    put_factors(factor);
    put_scaled(At::A, read_fetched_tokens(At::A), factor.before, factor.first);
    put_scaled(At::R, read_fetched_tokens(At::R), factor.first, factor.second);
    factor.invert();
    put_scaled(At::B, read_fetched_tokens(At::B), factor.first, factor.second);
    put_scaled(At::K, read_fetched_tokens(At::K), factor.first, factor.second);
    sync_block();  // the first warp has written `middle` and `end`
    put_states(states, shared);
}

// Products of a state and its gradient, summed over value rows: of column 8 j + 2 q in x[2 j], of the
// next in x[2 j + 1].
struct Columns { float x[N / 4]; };

// A lane gives away half of the sums that it has, and gets the other half of another lane's.
template <int COUNT> DEVICE void halve(Columns& sum, int& first, int lanes) {
    bool is_upper = thread_index() & lanes;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        float given = is_upper ? sum.x[i] : sum.x[i + COUNT];
        sum.x[i] = (is_upper ? sum.x[i + COUNT] : sum.x[i]) + warp_shuffle(given, lanes);
    }
    first += is_upper ? COUNT : 0;
}
// What scales with the state between two chunks, of this warp's value rows
DEVICE void put_leaving(Columns& sum, float* leaving) {
    int first = 0;
    halve<8>(sum, first, 16);
    halve<4>(sum, first, 8);
    halve<2>(sum, first, 4);
    *(FloatPair*)(leaving + first / 2 * 8 + thread_index() % 4 * 2) = FloatPair{sum.x[0], sum.x[1]};
}

DEVICE void begin(const PersistentBackward& p, int slab, float* leaving) {
    Columns sum = {};
    u64 first = ((u64)block_y() * N + slab * 16) * N;
    each_pair([&](int j, int, int row, int c) {
        u64 place = first + row * N + c;
        FloatPair d{0.0f, 0.0f}, x = *(const FloatPair*)(p.last_state + place);
        if (p.dlast_state) d = *(const FloatPair*)(p.dlast_state + place);
        store_global(p.dstate + place, d);
        sum.x[2 * j] += x.x * d.x, sum.x[2 * j + 1] += x.y * d.y;
    });
    put_leaving(sum, leaving);
}

// The gradient of the entering state, from that of the leaving one; this warp's rows.
DEVICE void step_back(const PersistentBackward& p, const Documents& documents, int slab, const Shared& shared,
                      float* leaving) {
    Slab<> s;
    float* dstate = p.dstate + ((u64)block_y() * N + slab * 16) * N;
    bool is_carried = documents.is_carried();
    each_pair([&](int j, int half, int row, int c) {
        FloatPair d = *(const FloatPair*)(dstate + row * N + c);
        s.x[j][2 * half] = is_carried ? d.x * shared.end[c] : 0.0f;
        s.x[j][2 * half + 1] = is_carried ? d.y * shared.end[c + 1] : 0.0f;
    });
    warpgroup::add_product_transposed(s, At::DY, slab * 16, At::R, Range{0, C});
    warpgroup::add_product_transposed(s, At::Z, slab * 16, At::A, Range{0, C});
    Columns sum = {};
    each_pair([&](int j, int half, int row, int c) {
        float x, y, *d = s.x[j] + 2 * half;
        get_pair(At::STATE, slab * 16 + row, c, x, y);
        sum.x[2 * j] += x * d[0], sum.x[2 * j + 1] += y * d[1];
        store_global(dstate + row * N + c, FloatPair{d[0] * shared.middle[c], d[1] * shared.middle[c + 1]});
    });
    put_leaving(sum, leaving);
}

KERNEL(wkv7_persistent_backward, PersistentBackward, THREADS, 2) {
    Shared& shared = shared_at<Shared>(At::SHARED);
    int group = warp_index() / GROUP_WARPS, slab = warp_index() % GROUP_WARPS;
    float *leaving = &shared_at<float>(Persistent::LEAVING), *earlier = leaving + GROUP_WARPS * N;
    if (group == 1) begin(p, slab, leaving + slab * N);
    fetch(p, p.M - 1);
    sync_block();
#pragma unroll 1
    for (int chunk = p.M - 1; chunk >= 0; chunk--) {
        Position at = position(p.T, p.H, p.M, chunk);
        put_fetched(p, at, shared);
        warpgroup::sync_block();

        Documents documents = read_documents(shared.documents);
        input_gradients(p.out, at, documents);
        if (documents.is_packed()) {
            warpgroup::sync_block();
            zero_rows(At::R, documents.entering, C);
            zero_rows(At::A, documents.entering, C);
            warpgroup::sync_block();
        }
        if (group == 1) step_back(p, documents, slab, shared, earlier + slab * N);
        // loaded before the barrier, while other warps still compute
        Read read = load_again(p.in, at);
        warpgroup::sync_block();

        Written written = load_written(p.out, at);
        if (chunk > 0) fetch(p, chunk - 1);
        decay_gradient<GROUP_WARPS>(p.out.w, at, read, written, leaving, documents, shared);
        sync_block();
        float* next = earlier;
        earlier = leaving, leaving = next;
    }
}
