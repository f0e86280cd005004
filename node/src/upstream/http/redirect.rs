//! Where an upstream may send a fetch: an origin that can redirect must not be able to make this
//! node read what only this node can reach (server-side request forgery).
//!
//! Promises that a redirect stays with the configured host and scheme unless the configuration
//! names the other host; that none leads to a loopback, link-local or metadata address unless the
//! configured host is itself one of that kind, nor ever to this node's own listeners; and that it
//! is the address dialled that is judged, for a name may say something else the second time.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, OnceLock};

use http::header::{self, HeaderMap};
use url::{Host, Url};

/// Longest URL a redirect may lead to.
const LOCATION_BYTES_MAX: usize = 8 << 10;

/// Services of clouds that hand out credentials, and are at no link-local address.
const METADATA_V4: [Ipv4Addr; 3] = [
    Ipv4Addr::new(100, 100, 100, 200), // Alibaba
    Ipv4Addr::new(168, 63, 129, 16),   // Azure
    Ipv4Addr::new(192, 0, 0, 192),     // Oracle
];
const METADATA_V6: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254), // Amazon
    Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),  // Google
];
/// Amazon's, Google's, Azure's and others': the one link-local address that is worth most.
const METADATA_LINK_LOCAL: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Where this node listens, once it does.
#[derive(Debug, Clone, Default)]
pub struct OwnListeners(Arc<OnceLock<Vec<SocketAddr>>>);

/// The addresses that one request may reach.
#[derive(Debug)]
pub(super) enum Reach {
    /// All: the operator named the host.
    Configured,
    /// An upstream named it.
    Redirected {
        /// What the configured host's own address is.
        configured: Kind,
        own: OwnListeners,
    },
}

/// What an address is to the machine that dials it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Elsewhere,
    Loopback,
    LinkLocal,
    Metadata,
}

impl OwnListeners {
    /// Once; a later call changes nothing.
    pub fn set(&self, addresses: impl IntoIterator<Item = SocketAddr>) {
        _ = self.0.set(addresses.into_iter().collect());
    }

    fn contain(&self, address: SocketAddr) -> bool {
        let own = self.0.get().map(Vec::as_slice).unwrap_or_default();
        let (ip, port) = (address.ip().to_canonical(), address.port());
        own.iter()
            .filter(|listener| listener.port() == port)
            .map(|listener| listener.ip().to_canonical())
            .any(|listener| listener == ip || listener.is_unspecified() && is_own(ip))
    }
}

impl Reach {
    pub(super) fn permits(&self, address: SocketAddr) -> bool {
        match self {
            Self::Configured => true,
            Self::Redirected { configured, own } => {
                let kind = Kind::of(address.ip());
                (kind == Kind::Elsewhere || kind == *configured) && !own.contain(address)
            }
        }
    }
}

impl Kind {
    pub(super) fn of(ip: IpAddr) -> Self {
        match embedded(ip.to_canonical()) {
            // The unspecified address reaches this machine.
            ip if ip.is_loopback() || ip.is_unspecified() => Self::Loopback,
            IpAddr::V4(ip) if ip.octets()[0] == 0 => Self::Loopback,
            IpAddr::V4(METADATA_LINK_LOCAL) => Self::Metadata,
            IpAddr::V4(ip) if METADATA_V4.contains(&ip) => Self::Metadata,
            IpAddr::V6(ip) if METADATA_V6.contains(&ip) => Self::Metadata,
            IpAddr::V4(ip) if ip.is_link_local() => Self::LinkLocal,
            IpAddr::V6(ip) if ip.is_unicast_link_local() => Self::LinkLocal,
            _ => Self::Elsewhere,
        }
    }
}

/// Where a redirect leads, if it may be followed at all; `configured` is the upstream's own URL,
/// and `hosts` are those that its configuration names besides.
pub(super) fn target(
    configured: &Url,
    from: &Url,
    headers: &HeaderMap,
    hosts: &[Host],
) -> Option<Url> {
    let location = std::str::from_utf8(headers.get(header::LOCATION)?.as_bytes()).ok()?;
    let to = from.join(location).ok()?;
    let host = to.host()?.to_owned();
    let is_at_home = configured.host() == to.host() && configured.scheme() == to.scheme();
    let scheme_fits = to.scheme() == "https" || to.scheme() == "http" && from.scheme() == "http";
    let has_no_user = to.username().is_empty() && to.password().is_none();
    let may_be_followed = (is_at_home || hosts.contains(&host))
        && scheme_fits
        && has_no_user
        && to.as_str().len() <= LOCATION_BYTES_MAX;
    may_be_followed.then_some(to)
}

/// The IPv4 address that an IPv6 one stands for, where a translator on the way would take it for
/// that: NAT64 (RFC 6052) and 6to4 (RFC 3056).
fn embedded(ip: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = ip else { return ip };
    match v6.octets() {
        [0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d]
        | [0x20, 0x02, a, b, c, d, ..] => IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
        _ => ip,
    }
}

/// Whether it is an address of this machine: only those can be bound.
fn is_own(ip: IpAddr) -> bool {
    UdpSocket::bind((ip, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn a_redirect_stays_at_home_unless_the_configuration_names_the_host() {
        let hosts = ["g", "h2", "[::2]"].map(|host| Host::parse(host).unwrap());
        let led = |configured: &str, from: &str, to: &[u8]| {
            let headers =
                HeaderMap::from_iter([(header::LOCATION, HeaderValue::from_bytes(to).unwrap())]);
            let [configured, from] = [configured, from].map(|url| Url::parse(url).unwrap());
            target(&configured, &from, &headers, &hosts).map(String::from)
        };
        for (configured, from, to, expected) in [
            // At home: any path and port.
            ("http://h/", "http://h/a/b", "c?d", Some("http://h/a/c?d")),
            (
                "http://h/",
                "http://h/a",
                "http://h:81/",
                Some("http://h:81/"),
            ),
            ("http://h/", "http://h/a", "http://H/", Some("http://h/")),
            // Another scheme is another host's business.
            ("http://h/", "http://h/a", "https://h/b", None),
            (
                "http://g/",
                "http://g/a",
                "https://g/b",
                Some("https://g/b"),
            ),
            ("https://h/", "https://h/a", "http://h/b", None),
            // Never down from https, wherever it leads.
            ("https://g/", "https://g/a", "http://g/b", None),
            ("http://h/", "https://g/a", "http://h/b", None),
            // Elsewhere only where named, and home again.
            ("https://h/", "https://h/a", "//g/b", Some("https://g/b")),
            ("https://h/", "https://g/b", "//h/c", Some("https://h/c")),
            (
                "http://h/",
                "http://h/",
                "http://[::2]/",
                Some("http://[::2]/"),
            ),
            ("https://h/", "https://h/a", "//i/b", None),
            ("https://h/", "https://h/a", "//sub.g/b", None),
            ("http://h/", "http://h/", "http://127.0.0.1/", None),
            // What no request is made of.
            ("http://h/", "http://h/a", "gopher://h/b", None),
            ("http://h/", "http://h/a", "http://u@h/b", None),
        ] {
            let found = led(configured, from, to.as_bytes());
            assert_eq!(found.as_deref(), expected, "{from} to {to}");
        }
        assert_eq!(led("http://h/", "http://h/", b"\xff"), None);
    }

    #[test]
    fn addresses_that_only_this_machine_can_reach_are_known_in_every_spelling() {
        for (ip, kind) in [
            ("127.0.0.1", Kind::Loopback),
            ("127.9.9.9", Kind::Loopback),
            ("0.0.0.0", Kind::Loopback),
            ("0.1.2.3", Kind::Loopback),
            ("::1", Kind::Loopback),
            ("::", Kind::Loopback),
            ("::ffff:127.0.0.1", Kind::Loopback),
            ("64:ff9b::7f00:1", Kind::Loopback),
            ("2002:7f00:1::", Kind::Loopback),
            ("169.254.169.254", Kind::Metadata),
            ("::ffff:169.254.169.254", Kind::Metadata),
            ("64:ff9b::a9fe:a9fe", Kind::Metadata),
            ("100.100.100.200", Kind::Metadata),
            ("fd00:ec2::254", Kind::Metadata),
            ("169.254.1.1", Kind::LinkLocal),
            ("fe80::1", Kind::LinkLocal),
            ("10.0.0.1", Kind::Elsewhere),
            ("192.168.1.1", Kind::Elsewhere),
            ("93.184.216.34", Kind::Elsewhere),
            ("2606:2800::1", Kind::Elsewhere),
        ] {
            assert_eq!(Kind::of(ip.parse().unwrap()), kind, "{ip}");
        }
    }

    #[test]
    fn a_redirect_reaches_nothing_of_this_machine_unless_the_configured_host_is_of_that_kind() {
        let own = OwnListeners::default();
        own.set(["127.0.0.1:7400", "0.0.0.0:7402"].map(|text| text.parse().unwrap()));
        let permits = |configured: Kind, address: &str| {
            let own = own.clone();
            Reach::Redirected { configured, own }.permits(address.parse().unwrap())
        };
        assert!(permits(Kind::Elsewhere, "10.0.0.1:80"));
        assert!(!permits(Kind::Elsewhere, "127.0.0.1:80"));
        assert!(!permits(Kind::Elsewhere, "169.254.169.254:80"));
        assert!(permits(Kind::Loopback, "127.0.0.1:80"));
        assert!(!permits(Kind::Loopback, "169.254.169.254:80"));
        assert!(!permits(Kind::LinkLocal, "169.254.169.254:80"));
        // Its own listeners: by their address, or by any of this machine's if that is a wildcard.
        assert!(!permits(Kind::Loopback, "127.0.0.1:7400"));
        assert!(!permits(Kind::Loopback, "[::ffff:127.0.0.1]:7400"));
        assert!(permits(Kind::Loopback, "127.0.0.2:7400"));
        assert!(!permits(Kind::Loopback, "127.0.0.2:7402"));
        assert!(permits(Kind::Loopback, "10.255.255.254:7402"));
        assert!(Reach::Configured.permits("127.0.0.1:7400".parse().unwrap()));
    }
}
