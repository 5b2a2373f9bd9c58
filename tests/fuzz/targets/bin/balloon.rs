//! See `ferry_fuzz::balloon`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ferry_fuzz::balloon(data));
