//! Copies guest memory between two machines of this process, leaving out what was never touched.

use ferry_memory::GuestView;

/// Copies every populated page of `from`, a paused machine's, to `to`, which runs nowhere.
pub(crate) fn memory(from: &GuestView, to: &GuestView) {
    for run in from.resident().expect("resident pages").runs() {
        let mut bytes = Vec::new();
        from.read_run(run, &mut bytes).expect("source memory");
        to.write(run.start, &bytes).expect("destination memory");
    }
}
