//! Guests around a guest: what they do not change is passed on.

/// Passes these methods of [`Guest`](ferry_migrate::Guest) on to `self.guest`.
macro_rules! pass_on {
    ($($method:ident)*) => { $( $crate::stage::pass_on!(@ $method); )* };
    (@ spec) => {
        fn spec(&self) -> ferry_migrate::MachineSpec {
            self.guest.spec()
        }
    };
    (@ machine) => {
        fn machine(&self) -> Option<u128> {
            self.guest.machine()
        }
    };
    (@ memory) => {
        fn memory(&self) -> ferry_memory::GuestView {
            self.guest.memory()
        }
    };
    (@ dirty_sources) => {
        fn dirty_sources(
            &mut self,
        ) -> Result<Vec<Box<dyn ferry_dirtylog::DirtySource>>, ferry_migrate::GuestError> {
            self.guest.dirty_sources()
        }
    };
    (@ return_dirty) => {
        fn return_dirty(&mut self, pages: &ferry_pages::PageSet) {
            self.guest.return_dirty(pages);
        }
    };
    (@ pause) => {
        fn pause(&mut self) -> Result<ferry_migrate::RunPermit, ferry_migrate::GuestError> {
            self.guest.pause()
        }
    };
    (@ resume) => {
        fn resume(
            &mut self,
            permit: ferry_migrate::RunPermit,
        ) -> Result<(), (ferry_migrate::RunPermit, ferry_migrate::GuestError)> {
            self.guest.resume(permit)
        }
    };
    (@ save) => {
        fn save(
            &mut self,
            out: &mut ferry_migrate::StateWriter,
        ) -> Result<(), ferry_migrate::GuestError> {
            self.guest.save(out)
        }
    };
    (@ load) => {
        fn load(
            &mut self,
            state: &ferry_migrate::StateReader,
        ) -> Result<(), ferry_migrate::GuestError> {
            self.guest.load(state)
        }
    };
}

pub(crate) use pass_on;
