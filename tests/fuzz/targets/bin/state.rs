//! See `ferry_fuzz::state`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ferry_fuzz::state(data));
