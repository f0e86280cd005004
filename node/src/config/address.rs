//! A host and a port, as nodes dial each other.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};
use std::str::FromStr;

/// Longest host name (RFC 1035).
const HOST_BYTES_MAX: usize = 253;

/// `host:port`; a host name is resolved again at each dial.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    /// A name or an IP address, without brackets.
    pub host: String,
    /// 0 only where it was made of a listen address that leaves the port open: the port bound
    /// counts then.
    pub port: u16,
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self {
            host: address.ip().to_string(),
            port: address.port(),
        }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let no_port = || {
            format!(
                "`{text}` has no port: write it like `{}:7401`",
                if text.is_empty() { "host" } else { text }
            )
        };
        let (host, port) = text.rsplit_once(':').ok_or_else(no_port)?;
        let host = match host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
        {
            Some(inner) => inner
                .parse::<Ipv6Addr>()
                .map_err(|_| format!("`{inner}` is not an IPv6 address"))?
                .to_string(),
            None if host.contains(':') => {
                return Err(format!(
                    "`{text}` is ambiguous: write an IPv6 address in brackets, like `[::1]:7401`"
                ));
            }
            None => host.to_owned(),
        };
        if !is_host(&host) {
            return Err(format!("`{host}` is not a host name or IP address"));
        }
        let port = port
            .parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| format!("`{port}` is not a port from 1 to 65535"))?;
        Ok(Self { host, port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

fn is_host(host: &str) -> bool {
    (1..=HOST_BYTES_MAX).contains(&host.len())
        && host
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b".-_:".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for text in ["holdfast-0.holdfast:7401", "127.0.0.1:1", "[::1]:65535"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for (text, reason) in [
            ("holdfast-0", "has no port: write it like `holdfast-0:7401`"),
            ("", "has no port"),
            (":7401", "is not a host name"),
            ("a b:1", "is not a host name"),
            ("http://a:1", "ambiguous"),
            ("::1:7401", "ambiguous"),
            ("[x]:1", "is not an IPv6 address"),
            ("a:0", "is not a port"),
            ("a:65536", "is not a port"),
            ("a:", "is not a port"),
        ] {
            let error = text.parse::<Address>().unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
