//! A guest whose state cannot be loaded without a page of its memory.

use ferry_dirtylog::DirtySource;
use ferry_memory::GuestView;
use ferry_migrate::{
    Guest, GuestError, Host, MachineSpec, Refusal, RunPermit, StateReader, StateWriter,
};
use ferry_pages::PAGE_BYTES;
use ferry_process_guest::{ProcessGuest, ProcessHost};

/// It reads this page when its state is loaded.
pub struct Reads {
    guest: ProcessGuest,
    gfn: u64,
}

impl Guest for Reads {
    fn spec(&self) -> MachineSpec {
        self.guest.spec()
    }
    fn memory(&self) -> GuestView {
        self.guest.memory()
    }
    fn dirty_sources(&mut self) -> Result<Vec<Box<dyn DirtySource>>, GuestError> {
        self.guest.dirty_sources()
    }
    fn pause(&mut self) -> Result<RunPermit, GuestError> {
        self.guest.pause()
    }
    fn resume(&mut self, permit: RunPermit) -> Result<(), (RunPermit, GuestError)> {
        self.guest.resume(permit)
    }
    fn save(&mut self, out: &mut StateWriter) -> Result<(), GuestError> {
        self.guest.save(out)
    }
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
