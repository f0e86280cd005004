//! How long a message takes to each peer and back.
//!
//! What counts is the median of the latest answers: a dial, or a moment in which a machine is busy,
//! makes single ones late and is no distance; machines that stay busy are far from each other.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use parking_lot::Mutex;

/// Answers of one peer: a way that became longer is known after so many heartbeats.
const KEPT: usize = 8;

#[derive(Default)]
pub(super) struct RoundTrips(Mutex<HashMap<u64, VecDeque<Duration>>>);

impl RoundTrips {
    pub(super) fn add(&self, peer: u64, round_trip: Duration) {
        let mut all = self.0.lock();
        let latest = all.entry(peer).or_default();
        if latest.len() == KEPT {
            latest.pop_front();
        }
        latest.push_back(round_trip);
    }

    /// Nothing if it was never measured.
    pub(super) fn to(&self, peer: u64) -> Duration {
        self.0.lock().get(&peer).map(median).unwrap_or_default()
    }
}

/// Of an even number the lesser of both in the middle.
fn median(latest: &VecDeque<Duration>) -> Duration {
    let mut sorted: Vec<Duration> = latest.iter().copied().collect();
    sorted.sort_unstable();
    let middle = sorted.len().saturating_sub(1) / 2;
    sorted.get(middle).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_waited_is_no_distance_and_a_longer_way_is() {
        let round_trips = RoundTrips::default();
        let ms = Duration::from_millis;
        assert_eq!(round_trips.to(2), ms(0));
        for took in [900, 300, 310, 2000] {
            round_trips.add(2, ms(took));
        }
        round_trips.add(3, ms(80));
        assert_eq!((round_trips.to(2), round_trips.to(3)), (ms(310), ms(80)));
        for _ in 0..KEPT {
            round_trips.add(2, ms(500));
        }
        assert_eq!(round_trips.to(2), ms(500));
    }
}
