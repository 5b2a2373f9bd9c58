//! A guest whose state cannot be loaded without a page of its memory.

use ferry_migrate::{Guest, GuestError, Host, MachineSpec, Refusal, StateReader};
use ferry_pages::PAGE_BYTES;
use ferry_process_guest::{ProcessGuest, ProcessHost};

/// It reads this page when its state is loaded.
pub struct Reads {
    guest: ProcessGuest,
    gfn: u64,
}

impl Guest for Reads {
    super::pass_on!(spec memory dirty_sources pause resume save);

    fn load(&mut self, state: &StateReader) -> Result<(), GuestError> {
        let read = self.memory().read(self.gfn, &mut [0; PAGE_BYTES]);
        read.map_err(|e| GuestError::with(format!("page {:#x} cannot be read", self.gfn), e))?;
        self.guest.load(state)
    }
}

/// Makes guests that read the page of this number.
pub struct Reader(pub u64);

impl Host for Reader {
    type Guest = Reads;

    fn prepare(&self, spec: &MachineSpec) -> Result<Reads, Vec<Refusal>> {
        ProcessHost::default().prepare(spec).map(|guest| Reads { guest, gfn: self.0 })
    }
}
