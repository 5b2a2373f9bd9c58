//! Memory that was freed goes back to the host.

#![expect(unsafe_code, reason = "glibc is told by `mallopt`")]

/// More than this at the end of a heap is given back.
const KEPT_BYTES: libc::c_int = 1 << 20;

/// By itself, glibc keeps the more the larger what was freed, up to 64 MiB for each of eight heaps a core. A
/// process that takes in machines for weeks would hold hundreds of MiB that nobody uses.
pub(crate) fn give_back_what_is_freed() {
    #[cfg(target_env = "gnu")]
    for (parameter, bytes) in [
        (libc::M_TRIM_THRESHOLD, KEPT_BYTES),
        // A heap is given back from its end, which few heaps reach sooner than many.
        (libc::M_ARENA_MAX, 4),
        // Buffers of a few MiB are not mapped anew each time.
        (libc::M_MMAP_THRESHOLD, 32 << 20),
    ] {
        // SAFETY: all are parameters of glibc's, and no thread but this one exists yet.
        let set = unsafe { libc::mallopt(parameter, bytes) };
        if set == 0 {
            tracing::debug!("glibc takes no parameter {parameter}");
        }
    }
}
