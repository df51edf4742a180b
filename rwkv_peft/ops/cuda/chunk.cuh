// What the kernels of a chunk share: where it lies, which documents it holds, rows in global memory.
#pragma once
#include "tile.cuh"

constexpr int GROUP_WARPS = C / 16;  // a group of warps covers the chunk in slabs of 16 tokens
constexpr int GROUP_THREADS = GROUP_WARPS * 32;
constexpr int WARPS = 2 * GROUP_WARPS;  // two groups do different products side by side
constexpr int THREADS = WARPS * 32;
// Outside of products a thread has eight channels of two tokens, a warp all channels of eight.
constexpr int TOKENS = 2;
constexpr int WARP_TOKENS = 4 * TOKENS;
static_assert(WARPS * WARP_TOKENS == C && (C == 32 || C == 64), "the chunk is covered once");

// Tensors are (B, T, H, N); a block works on one chunk of one head.
struct Position {
    int chunk;
    u64 first;      // offset of the chunk's first token
    int stride;     // from token to token
    int length;     // tokens up to the end of the row, of which up to C are in the chunk
    u64 matrix;     // number of the chunk in (B, H, M)
};

DEVICE Position position(int T, int H, int M, int chunk) {
    int row = block_y() / H, head = block_y() % H;
    return {chunk, ((u64)row * T + (u64)chunk * C) * H * N + head * N, H * N, T - chunk * C,
            (u64)block_y() * M + chunk};
}

// The documents of a chunk. Tokens before `entering` go on with the state that enters the chunk, and
// those from `leaving` on are of the document whose state leaves it.
struct Documents {
    u64 starts;  // bit t: token t begins a document; bit 0 always
    int entering, leaving;
    DEVICE int first(int t) const { return 63 - leading_zeros(starts & (~0ull >> (63 - t))); }
    DEVICE int last(int t) const {
        u64 later = t < 63 ? starts >> (t + 1) : 0;
        return later ? t + first_set(later) - 1 : C - 1;
    }
    DEVICE bool is_packed() const { return entering < C; }
    DEVICE bool is_carried() const { return entering == C; }
};

// To be followed by sync_block and read_documents. `segments` (B, T) numbers the documents; if null, there
// is one.
DEVICE void write_documents(const int* segments, int T, int H, int chunk, u32* shared) {
    int t = thread_index();
    const int* here = segments + (u64)(block_y() / H) * T + (u64)chunk * C;
    if (t < 64) {
        bool is_start = t == 0;
        if (segments && t > 0 && t < C && chunk * C + t < T) is_start = here[t] != here[t - 1];
        u32 bits = warp_ballot(is_start);
        if (t % 32 == 0) shared[t / 32] = bits;
    }
    if (t == 0) shared[2] = !segments || chunk == 0 || here[0] == here[-1];
}

DEVICE Documents read_documents(const u32* shared) {
    Documents d;
    d.starts = (u64)shared[1] << 32 | shared[0];
    d.entering = shared[2] ? d.last(0) + 1 : 0;
    d.leaving = d.first(C - 1);
    return d;
}

// Which columns a row of pair products keeps: the tokens of its document that it sees (those before
// it), or that see it (those after), itself included.
struct Bounds {
    int begin, end;  // 16-token blocks outside of which a product has nothing
    int slab;
    bool is_later, is_packed;
    int first[2], count[2];  // columns of the two rows of the slab that this lane has of a result
};

DEVICE Bounds bounds(int slab, const Documents& d, bool is_later) {
    Bounds b{is_later ? slab : 0, is_later ? C / 16 : slab + 1, slab, is_later, d.is_packed()};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = slab * 16 + half * 8 + thread_index() % 32 / 4;
        int low = is_later ? row : 0, high = is_later ? C - 1 : row;
        if (b.is_packed) {
            if (is_later) high = d.last(row);
            else low = d.first(row);
        }
        b.first[half] = low, b.count[half] = high - low + 1;
    }
    return b;
}

// Zeroes what a 16x16 block of pair products has beyond the bounds; two tiles of a slab.
DEVICE void mask_block(float (*c)[4], int block, const Bounds& b, bool with_itself) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        // a token is the last that it sees, and the first that sees it
        int first = b.first[half] + (b.is_later && !with_itself), count = b.count[half] - !with_itself;
        int column = block * 16 + thread_index() % 4 * 2 - first;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float& x = c[i / 2][half * 2 + i % 2];
            x = (u32)(column + i / 2 * 8 + i % 2) < (u32)count ? x : 0.0f;
        }
    }
}

// One 16x16 block of pair products left right^T, within bounds
DEVICE void set_block(Slab<2>& c, const Rows& left, const Rows& right, int block, const Bounds& b,
                      bool with_itself) {
    clear(c);
    add_outer(c, left, right);
    // with one document, only the block on the diagonal is cut
    if (b.is_packed || block == b.slab) mask_block(c.x, block, b, with_itself);
}

// Rows from begin to end of a tile = 0, by all threads of the block.
DEVICE void zero_rows(Tile tile, int begin, int end) {
    for (int i = begin * (N / 2) + thread_index(); i < end * (N / 2); i += THREADS)
        set_pair(tile, i / (N / 2), i % (N / 2) * 2, 0.0f, 0.0f);
}

// ------------------------------------------------------------------------------------------------
// This thread's share: tokens own_token() and the next, eight channels from own_channel() on.
DEVICE int own_token() { return thread_index() / 32 * WARP_TOKENS + thread_index() % 32 / 8 * TOKENS; }
DEVICE int own_channel() { return thread_index() % 8 * 8; }

// This thread's eight channels of a row of N in shared memory. Half the threads begin with the later
// four: eight of them, which meet the memory at once, then meet all its banks.
DEVICE int first_four() { return own_channel() / (N / 2) * 4; }
DEVICE void read_eight(float (&x)[8], const float* row) {
    int first = first_four();
    const float* here = row + own_channel();
    FloatFour a = *(const FloatFour*)(here + first), b = *(const FloatFour*)(here + 4 - first);
#pragma unroll
    for (int c = 0; c < 4; c++) x[c] = first ? b.x[c] : a.x[c], x[4 + c] = first ? a.x[c] : b.x[c];
}
DEVICE void write_eight(float* row, const float (&x)[8]) {
    int first = first_four();
    float* here = row + own_channel();
    FloatFour a, b;
#pragma unroll
    for (int c = 0; c < 4; c++) a.x[c] = first ? x[4 + c] : x[c], b.x[c] = first ? x[c] : x[4 + c];
    *(FloatFour*)(here + first) = a, *(FloatFour*)(here + 4 - first) = b;
}

struct Tokens { RawEight x[TOKENS]; };

DEVICE Tokens load_tokens(const Io* tensor, const Position& at) {
    Tokens tokens;
    const Io* here = tensor + at.first + own_channel();
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
        int t = own_token() + i;
        if (t < at.length) tokens.x[i] = *(const RawEight*)(here + t * at.stride);
        else tokens.x[i] = RawEight{};
    }
    return tokens;
}

// Starts copying them into a tile, where `read_fetched_tokens` of the same thread finds them.
DEVICE void fetch_tokens(Tile tile, const Io* tensor, const Position& at) {
    const Io* here = tensor + at.first + own_channel();
    tile = computed_here(tile);  // else a loop would keep an address for each tile
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
        int t = own_token() + i;
        Vector* there = shared_at<RawEight>(tile + place(t, own_channel())).x;
#pragma unroll
        for (int j = 0; j < (int)(sizeof(RawEight) / 16); j++)
            copy_async(there + j, (const Vector*)(here + t * at.stride) + j, t < at.length);
    }
}
DEVICE Tokens read_fetched_tokens(Tile tile) {
    Tokens tokens;
#pragma unroll
    for (int i = 0; i < TOKENS; i++)
        tokens.x[i] = shared_at<RawEight>(tile + place(own_token() + i, own_channel()));
    return tokens;
}

// Starts copying a piece to shared memory, where it is the piece number `index`.
DEVICE void fetch_piece(Tile tile, int index, const Op* from) {
    Op* to = piece(&shared_at<Op>(tile), 0, index);
#pragma unroll
    for (int i = 0; i < VECTORS; i++) copy_async((Vector*)to + i, (const Vector*)from + i);
}
DEVICE Fragment read_fetched_piece(Tile tile, int index) {
    Fragment f;
    load(f, piece(&shared_at<Op>(tile), 0, index));
    return f;
}

// Tile rows = tokens, or tokens times factors
DEVICE void put_tokens(Tile tile, const Tokens& tokens) {
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
#if IO == 0
        shared_at<RawEight>(tile + place(own_token() + i, own_channel())) = tokens.x[i];
#else
        float x[8];
        unpack(tokens.x[i], x);
        set_eight(tile, own_token() + i, own_channel(), x);
#endif
    }
}
DEVICE void put_scaled(Tile tile, const Tokens& tokens, const float (&first)[8],
                       const float (&second)[8]) {
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
        float x[8];
        unpack(tokens.x[i], x);
#pragma unroll
        for (int c = 0; c < 8; c++) x[c] *= i == 0 ? first[c] : second[c];
        set_eight(tile, own_token() + i, own_channel(), x);
    }
}

// ------------------------------------------------------------------------------------------------
// Slabs in global memory, rows of 16 tokens at row0. Of 16-bit numbers the four lanes of a row
// exchange what they have of 32 columns, so that each writes or reads eight neighbours.
#if IO < 2
// x[i] of lane q of four = x[q] of lane i
DEVICE void transpose_quad(u32 (&x)[4]) {
    int q = thread_index() % 4;
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & bit) continue;
            u32 other = warp_shuffle(q & bit ? x[i] : x[i + bit], bit);
            x[i] = q & bit ? other : x[i], x[i + bit] = q & bit ? x[i + bit] : other;
        }
}
DEVICE void store_rows(Io* tensor, const Position& at, int row0, const Slab<>& s) {
    int g = thread_index() % 32 / 4, q = thread_index() % 4;
#pragma unroll
    for (int j = 0; j < N / 32; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            Vector v;
#pragma unroll
            for (int k = 0; k < 4; k++) v.x[k] = pack(s.x[4 * j + k][2 * i], s.x[4 * j + k][2 * i + 1]);
            transpose_quad(v.x);
            int row = row0 + g + 8 * i;
            if (row < at.length)
                store_global(tensor + at.first + (u64)row * at.stride + 32 * j + 8 * q, v);
        }
}
DEVICE void load_rows(Slab<>& s, const Io* tensor, const Position& at, int row0) {
    int g = thread_index() % 32 / 4, q = thread_index() % 4;
#pragma unroll
    for (int j = 0; j < N / 32; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            Vector v{};
            int row = row0 + g + 8 * i;
            if (row < at.length)
                v = *(const Vector*)(tensor + at.first + (u64)row * at.stride + 32 * j + 8 * q);
            transpose_quad(v.x);
#pragma unroll
            for (int k = 0; k < 4; k++) unpack(v.x[k], s.x[4 * j + k][2 * i], s.x[4 * j + k][2 * i + 1]);
        }
}
#else
DEVICE void store_rows(Io* tensor, const Position& at, int row0, const Slab<>& s) {
    each_pair([&](int j, int i, int row, int column) {
        if (row0 + row < at.length)
            store_global(tensor + at.first + (u64)(row0 + row) * at.stride + column,
                         FloatPair{s.x[j][2 * i], s.x[j][2 * i + 1]});
    });
}
DEVICE void load_rows(Slab<>& s, const Io* tensor, const Position& at, int row0) {
    clear(s);
    each_pair([&](int j, int i, int row, int column) {
        if (row0 + row < at.length)
            unpack(*(const RawPair*)(tensor + at.first + (u64)(row0 + row) * at.stride + column),
                   s.x[j][2 * i], s.x[j][2 * i + 1]);
    });
}
#endif
