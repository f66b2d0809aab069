// CUDA's half precision on a processor: float16 values, each operation rounded.
#pragma once

struct __half {
    _Float16 value;
    __half() = default;
    __half(float x) : value(x) {}
    __half(double x) : value(x) {}
    __half(int x) : value(x) {}
    operator float() const { return value; }
    __half &operator+=(__half other) { value = value + other.value; return *this; }
};
using half = __half;
struct alignas(4) __half2 { half x, y; };
using half2 = __half2;

inline half operator+(half a, half b) { half c; c.value = a.value + b.value; return c; }
inline half operator-(half a, half b) { half c; c.value = a.value - b.value; return c; }
inline half operator*(half a, half b) { half c; c.value = a.value * b.value; return c; }
inline half operator/(half a, half b) { half c; c.value = a.value / b.value; return c; }
inline bool __hgt(half a, half b) { return a.value > b.value; }
inline bool __hlt(half a, half b) { return a.value < b.value; }
inline float __half2float(half x) { return x.value; }
inline half __float2half(float x) { return half(x); }
inline half __float2half_rn(float x) { return half(x); }
inline half2 make_half2(half x, half y) { return {x, y}; }
