package packet

import (
	"context"
	"net"
)

// Listen serves the connections of l, one at a time: a new connection ends the
// one before it, because the guest opens one only when it has lost the last.
// It returns when l fails or ctx is done, and closes l. Changed is called with
// true when a link is up and with false and the cause when a connection ends.
func (p *Pump) Listen(ctx context.Context, l net.Listener, changed func(up bool, cause error)) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	end := func() {}
	defer func() { end() }()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			if conn != nil {
				conn.Close()
			}
			return ctx.Err()
		}
		if err != nil {
			return err
		}
		end()
		linkCtx, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		end = func() { cancel(); <-done }
		go func() {
			defer close(done)
			changed(false, p.Serve(linkCtx, conn, func() { changed(true, nil) }))
		}()
	}
}
