//! See `ferry_fuzz::allow`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ferry_fuzz::allow(data));
