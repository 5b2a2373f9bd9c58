//! Lines of the control socket between the command and a hosting process.

/// Lines that either end may hear.
pub fn control(data: &[u8]) {
    ferry::fuzzing::hear(data).expect("a pair of sockets");
}
