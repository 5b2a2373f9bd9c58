//! What the guest put into a queue, checked as far as a queue goes.

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

/// The chains that are available now: no more than the queue has room for.
pub(crate) fn available<'a, M: GuestMemory>(
    queue: &mut Queue,
    ram: &'a M,
) -> Result<Vec<DescriptorChain<&'a M>>, String> {
    check_place(queue, ram)?;
    Ok(queue.iter(ram).map_err(|e| e.to_string())?.collect())
}

/// The buffers of `chain`, if it ends as it should: within the queue's size.
pub(crate) fn buffers<M: GuestMemory>(
    chain: DescriptorChain<&M>,
    queue_size: u16,
) -> Result<Vec<Descriptor>, String> {
    let buffers: Vec<Descriptor> = chain.take(queue_size.into()).collect();
    match buffers.last() {
        None => Err("a chain without a buffer that can be read".into()),
        Some(last) if last.has_next() => {
            Err("a chain that does not end: it loops, or leads out of its table".into())
        }
        Some(_) => Ok(buffers),
    }
}

/// Gives the chain that begins at `head` back to the driver; whether it wants an interrupt for that.
pub(crate) fn used<M: GuestMemory>(queue: &mut Queue, ram: &M, head: u16) -> Result<bool, String> {
    if head >= queue.size() {
        return Err(format!("a chain at {head} of a queue of {}", queue.size()));
    }
    queue.add_used(ram, head, 0).map_err(|e| e.to_string())?;
    let flags: u16 =
        ram.load(GuestAddress(queue.avail_ring()), Ordering::Acquire).map_err(|e| e.to_string())?;
    Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
}

/// Refuses a queue that is not wholly in guest memory.
fn check_place<M: GuestMemory>(queue: &Queue, ram: &M) -> Result<(), String> {
    if !queue.ready() {
        return Err("a queue is notified before it is ready".into());
    }
    let size = usize::from(queue.size());
    // Of the virtio specification, 2.7: bytes of the descriptor table and of both rings.
    for (at, bytes, access) in [
        (queue.desc_table(), 16 * size, Permissions::Read),
        (queue.avail_ring(), 6 + 2 * size, Permissions::Read),
        (queue.used_ring(), 6 + 8 * size, Permissions::Write),
    ] {
        if !ram.check_range(GuestAddress(at), bytes, access) {
            return Err(format!("a queue at {at:#x}, outside guest memory"));
        }
    }
    Ok(())
}
