//! See `ferry_fuzz::control`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ferry_fuzz::control(data));
