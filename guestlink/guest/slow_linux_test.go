package guest

import (
	"net"
	"os"
	"testing"
	"time"
)

// slowRate is the rate in bytes per second of a link that is the narrowest
// place of the whole way, as in a machine that is emulated in software.
const slowRate = 6 << 20

// slowConn writes at most slowRate, in the steps of a scheduler.
type slowConn struct {
	net.Conn
	free time.Time // when what was written has gone
}

func (c *slowConn) Write(b []byte) (int, error) {
	now := time.Now()
	if c.free.Before(now) {
		c.free = now
	}
	c.free = c.free.Add(time.Duration(len(b)) * time.Second / slowRate)
	if ahead := c.free.Sub(now); ahead > 5*time.Millisecond {
		<-time.After(ahead)
	}
	return c.Conn.Write(b)
}

// BenchmarkRatioSlowLink sends TCP through a link that is slow both ways: the
// queues before it must keep it filled.
func BenchmarkRatioSlowLink(b *testing.B) {
	privileged(b)
	for _, direction := range []string{"up", "down"} {
		b.Run(direction, func(b *testing.B) {
			w := linkWorld(b, "-slow")
			guest, host := w.connect(b)
			if direction == "down" {
				guest, host = host, guest
			}
			var ratios []float64
			for range 5 {
				ratios = append(ratios, streamFor(b, guest, host, time.Second)*1e9/8/slowRate)
			}
			b.Logf("%.2f", ratios)
			b.ReportMetric(median(ratios), "of-the-rate")
		})
	}
}

func slow(c net.Conn) net.Conn {
	if c == nil || os.Getenv(endSlowVar) == "" {
		return c
	}
	return &slowConn{Conn: c}
}
