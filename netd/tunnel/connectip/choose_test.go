package connectip

import (
	"testing"
	"time"
)

// drive steps c over so many seconds of a path, and returns what it wants.
func drive(c *chooser, seconds int, s Sample, rate uint64) Carriage {
	want := c.now
	for range seconds {
		s.Carried = c.carried + rate
		if s.Carried == 0 {
			s.Carried = 1
		}
		if want = c.step(s); want != c.now {
			return want
		}
	}
	return want
}

func TestChooser(t *testing.T) {
	clean := Sample{Sent: 200, RTT: 20 * time.Millisecond, Jitter: 2 * time.Millisecond}
	lossy := Sample{Sent: 200, Lost: 3, RTT: 20 * time.Millisecond}
	late := Sample{Sent: 200, RTT: 60 * time.Millisecond, Jitter: 40 * time.Millisecond}
	at := func(now Carriage) *chooser {
		c := &chooser{}
		c.at(now)
		return c
	}
	for name, c := range map[string]struct {
		from    Carriage
		path    Sample
		seconds int
		rate    uint64
		want    Carriage
	}{
		"clean":                      {TLS, clean, 300, 10_000, TLS},
		"loss":                       {TLS, lossy, 5, 10_000, HTTP3},
		"loss for a moment":          {TLS, lossy, 2, 10_000, TLS},
		"jitter":                     {TLS, late, 5, 10_000, HTTP3},
		"loss in bulk":               {TLS, lossy, 60, 10 << 20, TLS},
		"too few packets to tell":    {TLS, Sample{Sent: 2, Lost: 1}, 40, 100, TLS},
		"clean for less than needed": {HTTP3, clean, 59, 10_000, HTTP3},
		"clean for long":             {HTTP3, clean, 61, 10_000, TLS},
		"bulk over datagrams":        {HTTP3, lossy, 10, 10 << 20, TLS},
		"still rough":                {HTTP3, lossy, 300, 10_000, HTTP3},
	} {
		if got := drive(at(c.from), c.seconds, c.path, c.rate); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

// TestChooserCrowd: a flow that HTTP/3 has no room for stays slow by its own
// losses; it is moved to TLS and left there for a while.
func TestChooserCrowd(t *testing.T) {
	late := Sample{Sent: 200, RTT: 60 * time.Millisecond, Jitter: 40 * time.Millisecond}
	c := &chooser{}
	c.at(HTTP3)
	if got := drive(c, 20, late, 150<<10); got != HTTP3 {
		t.Fatalf("%s below bulk and without drops", got)
	}
	late.Dropped = crowded - 1
	if got := drive(c, 1, late, 150<<10); got != HTTP3 {
		t.Errorf("%s for a few drops", got)
	}
	late.Dropped += crowded
	if got := drive(c, 1, late, 150<<10); got != TLS {
		t.Fatalf("%s while packets find no room", got)
	}
	c.at(TLS)
	if got := drive(c, int(retryFirst/sampleEvery)-1, late, 150<<10); got != TLS {
		t.Errorf("%s again at once", got)
	}
}

// TestChooserDoesNotFlap: what cannot be opened is left alone for a while, and
// each return to TLS takes longer.
func TestChooserDoesNotFlap(t *testing.T) {
	lossy := Sample{Sent: 200, Lost: 3, RTT: 20 * time.Millisecond}
	clean := Sample{Sent: 200, RTT: 20 * time.Millisecond}
	c := &chooser{}
	c.at(TLS)
	if drive(c, 10, lossy, 1000) != HTTP3 {
		t.Fatal("loss did not ask for HTTP/3")
	}
	c.failed()
	if got := drive(c, int(retryFirst/sampleEvery)-1, lossy, 1000); got != TLS {
		t.Errorf("%s again at once after a failure", got)
	}
	if got := drive(c, 5, lossy, 1000); got != HTTP3 {
		t.Errorf("%s after the hold, want another try", got)
	}
	c.at(HTTP3)
	if got := drive(c, 61, clean, 1000); got != TLS {
		t.Fatal("not back on a clean path")
	}
	c.at(TLS)
	drive(c, 10, lossy, 1000)
	c.at(HTTP3)
	if got := drive(c, 100, clean, 1000); got != HTTP3 {
		t.Errorf("%s after 100 s, want the second return to take 120 s", got)
	}
}
