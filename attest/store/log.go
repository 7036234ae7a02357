package store

import (
	"context"
	"log/slog"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// quiet passes on etcd's errors, and nothing below.
func quiet(log *slog.Logger) *zap.Logger { return zap.New(core{zapcore.ErrorLevel, log}) }

type core struct {
	zapcore.LevelEnabler
	log *slog.Logger
}

func (c core) With(f []zapcore.Field) zapcore.Core {
	return core{c.LevelEnabler, slog.New(c.log.Handler().WithAttrs(attrs(f)))}
}

// firstStart is an error that every new member logs, until its first snapshot.
const firstStart = "failed to update storage version"

func (c core) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) && e.Message != firstStart {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c core) Write(e zapcore.Entry, f []zapcore.Field) error {
	c.log.LogAttrs(context.Background(), slog.LevelError, "etcd: "+e.Message, attrs(f)...)
	return nil
}

func (core) Sync() error { return nil }

func attrs(fields []zapcore.Field) []slog.Attr {
	m := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		f.AddTo(m)
	}
	list := make([]slog.Attr, 0, len(m.Fields))
	for k, v := range m.Fields {
		list = append(list, slog.Any(k, v))
	}
	return list
}
