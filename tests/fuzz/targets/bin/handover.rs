//! See `ferry_fuzz::handover`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ferry_fuzz::handover(data));
