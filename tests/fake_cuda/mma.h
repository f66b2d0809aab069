// Tensor cores on a processor. A warp shares a fragment; here each of its threads holds the whole of it and computes the whole product, so that
// all of them write the same. float16 is multiplied, and summed in the accumulator's type.
#pragma once
#include "cuda_fp16.h"

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K> struct size_of;
template <int M, int N, int K> struct size_of<matrix_a, M, N, K> { enum { rows = M, columns = K }; };
template <int M, int N, int K> struct size_of<matrix_b, M, N, K> { enum { rows = K, columns = N }; };
template <int M, int N, int K> struct size_of<accumulator, M, N, K> { enum { rows = M, columns = N }; };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
    enum { rows = size_of<Use, M, N, K>::rows, columns = size_of<Use, M, N, K>::columns };
    T at[rows][columns];
};

template <class F, class T> void fill_fragment(F &f, T value) {
    for (auto &row : f.at)
        for (auto &x : row) x = value;
}

template <class Use, int M, int N, int K, class T> void load_matrix_sync(fragment<Use, M, N, K, T, row_major> &f, const T *from, unsigned stride) {
    __syncwarp();
    for (int i = 0; i < f.rows; ++i)
        for (int j = 0; j < f.columns; ++j) f.at[i][j] = from[i * stride + j];
}

template <class Use, int M, int N, int K, class T> void load_matrix_sync(fragment<Use, M, N, K, T, col_major> &f, const T *from, unsigned stride) {
    __syncwarp();
    for (int i = 0; i < f.rows; ++i)
        for (int j = 0; j < f.columns; ++j) f.at[i][j] = from[j * stride + i];
}

template <int M, int N, int K, class T, class A, class B, class C>
void mma_sync(fragment<accumulator, M, N, K, T> &d, const fragment<matrix_a, M, N, K, A, B> &a, const fragment<matrix_b, M, N, K, A, C> &b,
              const fragment<accumulator, M, N, K, T> &c) {
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) {
            T sum = c.at[i][j];
            for (int k = 0; k < K; ++k) sum += T(float(a.at[i][k]) * float(b.at[k][j]));
            d.at[i][j] = sum;
        }
}

template <int M, int N, int K, class T> void store_matrix_sync(T *to, const fragment<accumulator, M, N, K, T> &f, unsigned stride, layout_t layout) {
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) (layout == mem_row_major ? to[i * stride + j] : to[j * stride + i]) = f.at[i][j];
    __syncwarp();
}

}  // namespace nvcuda::wmma
