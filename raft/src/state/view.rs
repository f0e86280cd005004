//! An entry as whoever reads it may judge it: settled, so that everything that covers the entry
//! from outside its record already counts. Judging a bare record is this file's alone.

use std::sync::Arc;

use bytes::Bytes;
use holdfast_proto::{
    Revision,
    peer::{EntryRecord, FailureRecord, Validators},
    timeline::{Millis, Phase, Timeline},
    v1::Origin,
};

use super::memory::Entry;

/// One entry, settled. Cheap to clone.
#[derive(Clone)]
pub struct View {
    entry: Arc<Entry>,
    timeline: Timeline,
}

impl View {
    /// The one place where an entry becomes what its readers see.
    pub(crate) fn settled(entry: Arc<Entry>) -> Self {
        Self {
            timeline: Timeline::from(&entry.record),
            entry,
        }
    }

    pub fn phase(&self, now: Millis) -> Phase {
        self.timeline.phase(now)
    }

    /// Whether its value may still be served.
    pub fn is_live(&self, now: Millis) -> bool {
        self.phase(now) != Phase::Expired
    }

    /// Past its refresh point, which may come after its lifetime (`min_refresh_interval`), or stale
    /// where nothing is refreshed ahead. A plain entry is nobody's to refresh.
    pub fn is_due(&self, now: Millis) -> bool {
        self.origin() != Origin::Plain && now >= self.timeline.due_at()
    }

    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// The source said that it has no such thing: what is served is that.
    pub fn is_negative(&self) -> bool {
        self.entry.record.is_negative
    }

    /// `None` if only the record was asked for, or there is none.
    pub fn value(&self) -> Option<&Bytes> {
        let value = self.entry.value.as_ref();
        value.filter(|_| !self.is_negative())
    }

    /// The revision of the value.
    pub fn version(&self) -> Revision {
        self.entry.record.version
    }

    /// The revision of the last change of any kind.
    pub fn changed(&self) -> Revision {
        self.entry.record.changed
    }

    pub fn origin(&self) -> Origin {
        self.entry.record.origin()
    }

    /// The failed fetches since the value came.
    pub fn failure(&self) -> Option<&FailureRecord> {
        self.entry.record.failure.as_ref()
    }

    pub fn content_type(&self) -> &str {
        &self.entry.record.content_type
    }

    pub fn tags(&self) -> &[String] {
        &self.entry.record.tags
    }

    pub fn size_bytes(&self) -> u64 {
        self.entry.record.size_bytes
    }

    pub fn content_hash(&self) -> u64 {
        self.entry.record.content_hash
    }

    /// What its source may be asked with whether the value is still the same.
    pub fn validators(&self) -> Option<&Validators> {
        self.entry.record.validators.as_deref()
    }
}

impl View {
    /// Of a record that nothing outside it covers.
    pub fn with_value(record: EntryRecord, value: impl Into<Box<[u8]>>) -> Self {
        Self::settled(Arc::new(Entry::new(record, value)))
    }
}

/// Of a record that nothing outside it covers, without its value.
impl From<EntryRecord> for View {
    fn from(record: EntryRecord) -> Self {
        Self::settled(Arc::new(Entry::without_value(record)))
    }
}

#[cfg(test)]
mod tests {
    use holdfast_proto::timeline::FOREVER;

    use super::*;

    fn view(origin: Origin, refresh_at_ms: Millis, fresh_until_ms: Millis) -> View {
        View::from(EntryRecord {
            origin: origin.into(),
            refresh_at_ms,
            fresh_until_ms,
            ..Default::default()
        })
    }

    #[test]
    fn a_value_is_due_at_its_refresh_point_or_else_when_it_is_stale() {
        assert!(!view(Origin::Fetched, 1_800, 2_000).is_due(1_799));
        assert!(view(Origin::Fetched, 1_800, 2_000).is_due(1_800));
        assert!(!view(Origin::Fetched, FOREVER, 2_000).is_due(1_999));
        assert!(view(Origin::Fetched, FOREVER, 2_000).is_due(2_000));
        // min_refresh_interval is longer than the lifetime.
        assert!(!view(Origin::Fetched, 5_000, 2_000).is_due(2_000));
        assert!(!view(Origin::Plain, 1_800, 2_000).is_due(2_000));
    }

    #[test]
    fn a_value_is_live_until_the_end_of_its_stale_windows() {
        let view = View::from(EntryRecord {
            fresh_until_ms: 2_000,
            stale_if_error_ms: 1_000,
            ..Default::default()
        });
        assert!(view.is_live(2_999) && !view.is_live(3_000));
    }
}
