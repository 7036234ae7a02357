// Package fprinttest makes fingers for tests: pictures of ridges that
// libfprint's matcher tells apart, and what puts them on its virtual reader
// (virtual_image, FP_VIRTUAL_IMAGE).
package fprinttest

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
)

// Size of a picture in pixels, at 500 per inch.
const (
	Width  = 256
	Height = 320
)

// ridge is the distance between two ridges in pixels, half a millimetre.
const ridge = 9.0

// Finger is a finger. Equal fingers leave equal ridges.
type Finger uint64

// Picture is one impression, a byte for each pixel: the same finger shifted
// and noisy by touch.
//
// The ridges are the waves of a phase that winds once around each of the
// finger's minutiae, as in AM-FM models of fingerprints (Larkin and Fletcher,
// 2007): at such a point a ridge ends or forks.
func (f Finger) Picture(touch uint64) []byte {
	r := rand.New(rand.NewPCG(uint64(f), 0x5e15))
	type minutia struct{ x, y, turn float64 }
	var all []minutia
	for len(all) < 40 {
		m := minutia{18 + r.Float64()*(Width-36), 18 + r.Float64()*(Height-36), 1}
		if r.IntN(2) == 0 {
			m.turn = -1
		}
		near := false
		for _, o := range all {
			near = near || math.Hypot(o.x-m.x, o.y-m.y) < 24
		}
		if !near {
			all = append(all, m)
		}
		if r.IntN(4000) == 0 {
			break
		}
	}
	cx, cy, bend := Width/2+r.Float64()*40-20, Height*0.9+r.Float64()*40, 0.6+r.Float64()*0.5
	t := rand.New(rand.NewPCG(uint64(f), touch))
	dx, dy := t.Float64()*6-3, t.Float64()*6-3
	out := make([]byte, Width*Height)
	for y := range Height {
		for x := range Width {
			px, py := float64(x)+dx, float64(y)+dy
			phase := 2 * math.Pi / ridge * math.Hypot((px-cx)*bend, py-cy)
			for _, m := range all {
				phase += m.turn * math.Atan2(py-m.y, px-m.x)
			}
			v := 128 + 100*math.Cos(phase) + t.NormFloat64()*6
			// A finger is round: the rest of the picture is white.
			if e := math.Hypot((float64(x)-Width/2)/(Width/2-4), (float64(y)-Height/2)/(Height/2-4)); e > 1 {
				v = 255
			}
			out[y*Width+x] = byte(min(max(v, 0), 255))
		}
	}
	return out
}

// Message is what puts a picture on the virtual reader, at whose socket it has
// to arrive.
func Message(picture []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, Width)
	b = binary.NativeEndian.AppendUint32(b, Height)
	return append(b, picture...)
}

// Put puts a picture on the virtual reader whose socket is conn's other end.
func Put(conn net.Conn, picture []byte) error {
	if _, err := conn.Write(Message(picture)); err != nil {
		return fmt.Errorf("virtual reader: %w", err)
	}
	return nil
}

// Retry has the virtual reader say that the picture was no good.
func Retry(conn net.Conn) error {
	const command = -1
	code := int32(command)
	b := binary.NativeEndian.AppendUint32(nil, uint32(code))
	if _, err := conn.Write(binary.NativeEndian.AppendUint32(b, 0)); err != nil {
		return fmt.Errorf("virtual reader: %w", err)
	}
	return nil
}
