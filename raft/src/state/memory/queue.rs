//! Which entry of a segment goes when memory is full: S3-FIFO (Yang et al., SOSP 2023).
//!
//! ```text
//!             seen lately? (ghost)
//! new key ──┬─ no ──► small (a tenth of the bytes) ──┬─ read more than once ──► main ──┬─ read since ──► its back again
//!           └─ yes ─► main                           └─ else: out, hash to ghost       └─ else: out
//! ```
//!
//! Chosen because a read only has to raise a small counter, and because keys that are read once
//! pass through `small` without pushing out what is read again and again.
//!
//! Promises: a node lives exactly as long as its entry (unlinked at once when the entry goes), so
//! nothing lingers, however often a key is overwritten or deleted; the ghost holds hashes only,
//! never more than the segment has entries. Must never know: values, readers, locks.

use std::collections::{HashMap, VecDeque};

use holdfast_proto::Key;

/// Reads are counted up to here: a key that was hot and is not any more leaves main after so many
/// rounds.
pub(super) const FREQUENCY_MAX: u8 = 3;
/// A key that left small with at most this many reads has not shown that it is read again (the
/// paper's threshold).
const FREQUENCY_COLD: u8 = 1;
/// Small is to be one in so many bytes of the segment.
const SMALL_SHARE: u64 = 10;
/// A segment of few entries still remembers so many keys.
const GHOST_MIN: usize = 16;

/// Where an entry stands, from `insert` until `remove` or `evict`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NodeId(u32);

/// The order of one segment's entries.
#[derive(Default)]
pub(super) struct Queues {
    nodes: Vec<Option<Node>>,
    vacant: Vec<NodeId>,
    small: Queue,
    main: Queue,
    ghost: Ghost,
}

/// An entry that has to go; it is in the queues no more.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Victim {
    pub(super) key: Key,
    pub(super) hash: u64,
    pub(super) bytes: u64,
}

struct Node {
    key: Key,
    hash: u64,
    bytes: u64,
    place: Place,
    before: Option<NodeId>,
    after: Option<NodeId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Small,
    Main,
}

/// A list through the nodes.
#[derive(Default)]
struct Queue {
    front: Option<NodeId>,
    back: Option<NodeId>,
    bytes: u64,
}

/// Keys that left small lately, by hash. A hash shared by two keys only lets one into main too
/// early.
#[derive(Default)]
struct Ghost {
    order: VecDeque<(u64, u64)>,
    /// Hash → its latest turn, so that an older place in `order` does not forget a key that came
    /// again.
    turns: HashMap<u64, u64>,
    turn: u64,
}

impl Queues {
    pub(super) fn bytes(&self) -> u64 {
        self.small.bytes + self.main.bytes
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.len() - self.vacant.len()
    }

    pub(super) fn insert(&mut self, key: Key, hash: u64, bytes: u64) -> NodeId {
        let place = if self.ghost.forget(hash) {
            Place::Main
        } else {
            Place::Small
        };
        let node = Node {
            key,
            hash,
            bytes,
            place,
            before: None,
            after: None,
        };
        let id = match self.vacant.pop() {
            Some(id) => id,
            None => {
                self.nodes.push(None);
                NodeId(
                    u32::try_from(self.nodes.len() - 1)
                        .expect("4 billion entries do not fit into memory"),
                )
            }
        };
        self.nodes[id.0 as usize] = Some(node);
        self.push_back(id, place);
        id
    }

    /// An overwritten entry keeps its place. Returns the size it had.
    pub(super) fn resize(&mut self, id: NodeId, bytes: u64) -> u64 {
        let node = self.node_mut(id);
        let before = std::mem::replace(&mut node.bytes, bytes);
        let place = node.place;
        let queue = self.queue_mut(place);
        queue.bytes = queue.bytes - before + bytes;
        before
    }

    /// Returns the size it had.
    pub(super) fn remove(&mut self, id: NodeId) -> u64 {
        self.unlink(id);
        self.vacate(id).bytes
    }

    /// Takes one entry out. `step` replaces the frequency of a key by what the function makes of it
    /// and returns what it was.
    ///
    /// Ends: each turn moves an entry from small to main or takes one from a frequency, and readers
    /// cannot raise frequencies for ever while they are beaten by it; `turns_max` makes that
    /// certain.
    pub(super) fn evict(
        &mut self,
        mut step: impl FnMut(&Key, fn(u8) -> u8) -> u8,
    ) -> Option<Victim> {
        let turns_max = self.len() * (FREQUENCY_MAX as usize + 2);
        for turn in 0.. {
            let from = if self.small_is_over() {
                Place::Small
            } else {
                Place::Main
            };
            let id = self.queue_mut(from).front?;
            let key = &self.node(id).key;
            let stays = match from {
                Place::Small => step(key, |_| 0) > FREQUENCY_COLD,
                Place::Main => step(key, |frequency| frequency.saturating_sub(1)) > 0,
            };
            self.unlink(id);
            if stays && turn < turns_max {
                self.push_back(id, Place::Main);
                continue;
            }
            let Node {
                key, hash, bytes, ..
            } = self.vacate(id);
            if from == Place::Small {
                self.ghost.remember(hash, self.len().max(GHOST_MIN));
            }
            return Some(Victim { key, hash, bytes });
        }
        None
    }

    fn small_is_over(&self) -> bool {
        self.main.front.is_none()
            || (self.small.front.is_some() && self.small.bytes >= self.bytes() / SMALL_SHARE)
    }

    fn push_back(&mut self, id: NodeId, place: Place) {
        let back = self.queue_mut(place).back.replace(id);
        match back {
            Some(back) => self.node_mut(back).after = Some(id),
            None => self.queue_mut(place).front = Some(id),
        }
        let node = self.node_mut(id);
        (node.place, node.before, node.after) = (place, back, None);
        let bytes = node.bytes;
        self.queue_mut(place).bytes += bytes;
    }

    fn unlink(&mut self, id: NodeId) {
        let &Node {
            place,
            before,
            after,
            bytes,
            ..
        } = self.node(id);
        match before {
            Some(before) => self.node_mut(before).after = after,
            None => self.queue_mut(place).front = after,
        }
        match after {
            Some(after) => self.node_mut(after).before = before,
            None => self.queue_mut(place).back = before,
        }
        self.queue_mut(place).bytes -= bytes;
    }

    fn vacate(&mut self, id: NodeId) -> Node {
        self.vacant.push(id);
        self.nodes[id.0 as usize]
            .take()
            .expect("an id lives as long as its node")
    }

    fn node(&self, id: NodeId) -> &Node {
        self.nodes[id.0 as usize]
            .as_ref()
            .expect("an id lives as long as its node")
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id.0 as usize]
            .as_mut()
            .expect("an id lives as long as its node")
    }

    fn queue_mut(&mut self, place: Place) -> &mut Queue {
        match place {
            Place::Small => &mut self.small,
            Place::Main => &mut self.main,
        }
    }
}

impl Ghost {
    fn remember(&mut self, hash: u64, len_max: usize) {
        self.turn += 1;
        self.order.push_back((hash, self.turn));
        self.turns.insert(hash, self.turn);
        while self.order.len() > len_max {
            let Some((hash, turn)) = self.order.pop_front() else {
                break;
            };
            if self.turns.get(&hash) == Some(&turn) {
                self.turns.remove(&hash);
            }
        }
    }

    fn forget(&mut self, hash: u64) -> bool {
        self.turns.remove(&hash).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Queues with the frequencies that the map would hold.
    #[derive(Default)]
    struct Segment {
        queues: Queues,
        frequencies: HashMap<Key, u8>,
        ids: HashMap<Key, NodeId>,
    }

    impl Segment {
        fn insert(&mut self, name: &str) {
            let key = key(name);
            let id = self.queues.insert(key.clone(), hash(&key), 1);
            self.frequencies.insert(key.clone(), 0);
            self.ids.insert(key, id);
        }

        fn read(&mut self, name: &str, times: u8) {
            *self.frequencies.get_mut(&key(name)).unwrap() += times;
        }

        fn evict(&mut self) -> Option<String> {
            let frequencies = &mut self.frequencies;
            let victim = self.queues.evict(|key, change| {
                let frequency = frequencies.get_mut(key).unwrap();
                std::mem::replace(frequency, change(*frequency))
            })?;
            self.ids.remove(&victim.key);
            Some(victim.key.to_string())
        }

        fn place(&self, name: &str) -> Place {
            self.queues.node(self.ids[&key(name)]).place
        }
    }

    fn key(name: &str) -> Key {
        Key::new(name.to_owned()).unwrap()
    }

    fn hash(key: &Key) -> u64 {
        holdfast_proto::content_hash(key)
    }

    #[test]
    fn keys_read_more_than_once_move_to_main_and_the_others_leave_in_order() {
        let mut segment = Segment::default();
        for name in ["a", "b", "c", "d"] {
            segment.insert(name);
        }
        segment.read("a", 2);
        segment.read("b", 1);
        assert_eq!(segment.evict().as_deref(), Some("b"));
        assert_eq!(segment.place("a"), Place::Main);
        assert_eq!(segment.evict().as_deref(), Some("c"));
        assert_eq!(segment.evict().as_deref(), Some("d"));
        assert_eq!(segment.evict().as_deref(), Some("a"));
        assert_eq!(segment.evict(), None);
        assert_eq!((segment.queues.bytes(), segment.queues.len()), (0, 0));
    }

    #[test]
    fn a_key_seen_lately_comes_back_into_main() {
        let mut segment = Segment::default();
        segment.insert("a");
        segment.insert("b");
        assert_eq!(segment.evict().as_deref(), Some("a"));
        segment.insert("a");
        segment.insert("new");
        assert_eq!(
            (segment.place("a"), segment.place("new")),
            (Place::Main, Place::Small)
        );
    }

    #[test]
    fn main_gives_a_read_key_another_round() {
        let mut segment = Segment::default();
        for name in ["a", "b"] {
            segment.insert(name);
            segment.read(name, 2);
        }
        segment.insert("c");
        assert_eq!(segment.evict().as_deref(), Some("c"));
        segment.read("a", 1);
        assert_eq!(
            segment.evict().as_deref(),
            Some("b"),
            "a was read since it came to main"
        );
        assert_eq!(segment.evict().as_deref(), Some("a"));
    }

    #[test]
    fn eviction_ends_while_every_key_is_read_all_the_time() {
        let mut queues = Queues::default();
        for name in ["a", "b", "c"] {
            queues.insert(key(name), hash(&key(name)), 1);
        }
        assert!(queues.evict(|_, _| FREQUENCY_MAX).is_some());
    }

    #[test]
    fn the_ghost_holds_no_more_keys_than_the_segment_and_forgets_the_oldest() {
        let mut segment = Segment::default();
        for i in 0..10 * GHOST_MIN {
            segment.insert(&format!("key{i}"));
            segment.evict();
        }
        let ghost = &segment.queues.ghost;
        assert_eq!(
            (ghost.order.len(), ghost.turns.len()),
            (GHOST_MIN, GHOST_MIN)
        );
        assert!(
            ghost.turns.contains_key(&hash(&key("key159")))
                && !ghost.turns.contains_key(&hash(&key("key143")))
        );
    }

    #[test]
    fn a_removed_key_leaves_no_node_behind() {
        let mut segment = Segment::default();
        for _ in 0..1000 {
            segment.insert("a");
            segment.insert("b");
            assert_eq!(segment.queues.remove(segment.ids[&key("a")]), 1);
            assert_eq!(segment.queues.resize(segment.ids[&key("b")], 5), 1);
            assert_eq!(segment.queues.bytes(), 5);
            segment.queues.remove(segment.ids[&key("b")]);
        }
        assert_eq!(
            (
                segment.queues.nodes.len(),
                segment.queues.len(),
                segment.queues.bytes()
            ),
            (2, 0, 0)
        );
        assert!(segment.queues.nodes.iter().all(Option::is_none));
    }
}
